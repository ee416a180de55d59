"""The README's Python runs as printed, and the commands it names exist."""

import re
import warnings
from pathlib import Path

import torch
from cases import case
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

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


def test_the_quantised_teacher_runs_as_printed(tmp_path, monkeypatch):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=100)  # fmt: skip
    full, student = (AutoModelForCausalLM.from_config(config) for _ in "ab")
    full.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(
        "fastdistill.stored_model.snapshot_download", lambda *_, **__: str(tmp_path / "hub")
    )
    monkeypatch.chdir(tmp_path)
    input_ids = torch.arange(96).view(8, 12)
    names = {
        "student": student,
        "batch": {"input_ids": input_ids},
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "load_teacher" in b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights are not near their teacher
        exec(block.replace("k=64", "k=9"), names)
    assert names["best"].ids.shape == (8, 12, 9)
    assert (tmp_path / "qwen3-8b-nf4" / "model.safetensors").is_file()
