"""The README's Python runs as printed, and the commands it names exist."""

import re
from pathlib import Path

import torch
from cases import case
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_losses_run_as_printed():
    c = case(torch.float32, V=200)
    lm_head = nn.Linear(16, 200, bias=False)
    names = {
        "hidden": c.hidden.requires_grad_(),
        "lm_head": lm_head,
        "labels": c.labels,
        "teacher_hidden": c.hidden.detach() * 1.1,
        "teacher_head": c.weight,
    }
    blocks = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "fd." in b]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert lm_head.weight.grad.abs().sum() > 0


def test_the_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make (\w+)", README))
    assert {"demo", "test"} <= named <= targets
    for file in re.findall(r"\]\((\w+\.md)\)", README):
        assert (ROOT / file).exists()
