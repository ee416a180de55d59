"""The README's Python runs as printed, and the commands it names exist."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdistill import DistillConfig, Teacher
from fastdistill.alignment.audits import Probes
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from helpers.cases import case
from helpers.served import ours
from helpers.trl_scene import TALKS, settings
from helpers.trl_scene import model as small

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


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
    blocks = [b for b in BLOCKS if "fd." in b]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert lm_head.weight.grad.abs().sum() > 0


def test_the_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make (\w+)", README))
    assert {"demo", "test"} <= named <= targets
    for file in re.findall(r"\]\(([\w/]+\.\w+)\)", README):
        assert (ROOT / file).exists()


def test_the_quantised_teacher_runs_as_printed(tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    full, student = (AutoModelForCausalLM.from_config(config) for _ in "ab")
    full.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr(
        "fastdistill.hf.checkpoint.snapshot_download", lambda *_, **__: str(tmp_path / "hub")
    )
    monkeypatch.chdir(tmp_path)
    input_ids = torch.arange(96).view(8, 12)
    names = {
        "student": student,
        "batch": {"input_ids": input_ids},
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }
    (block,) = (b for b in BLOCKS if "load_teacher" in b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights are not near their teacher
        exec(block.replace("k=64", "k=9"), names)
    assert names["best"].ids.shape == (8, 12, 9)
    assert (tmp_path / "qwen3-8b-nf4" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("config", ["DistillConfig", "GKDConfig", "DistillationConfig"])
def test_the_trainers_run_as_printed(tmp_path, monkeypatch, config):
    """Ours, and the drop-ins with their own configurations where TRL is installed."""
    if config == "DistillConfig":
        kind, more = DistillConfig, {"k": 8, "save_strategy": "steps"}
    else:
        trl = pytest.importorskip("trl")
        gkd = importlib.import_module("trl.experimental.gkd")
        kind = gkd.GKDConfig if config == "GKDConfig" else trl.DistillationConfig
        more = {"lmbda": 0.0} if config == "GKDConfig" else {"max_completion_length": 3}
    monkeypatch.chdir(tmp_path)
    tokenizer = shipped_teacher()[1]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    names = {
        "tokenizer": tokenizer,
        "train": TALKS,
        "prompts": [{"prompt": "a"}] * 4,
        "student": small(tokenizer, 0),
        "big": small(tokenizer, 7, hidden=48),
        config: lambda folder, **options: settings(kind, folder, max_steps=1, **more),
    }
    (block,) = (b for b in BLOCKS if f" {config}(" in b or f"={config}(" in b)
    exec(block.replace("import DistillConfig, ", "import "), names)
    assert names["trainer"].state.global_step == 1


def test_teachers_that_are_elsewhere_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = shipped_teacher()[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    big = small(tokenizer, 7, hidden=48)
    names = {"tokenizer": tokenizer, "train": TALKS, "big": big}
    built, served = (b for b in BLOCKS if "TeacherCache" in b or "ServedTeacher" in b)
    exec(built, names)
    assert names["cache"].manifest.settings.temperatures == (1.0, 2.0)
    with ours(Teacher(big)) as url:
        exec(served.replace("http://127.0.0.1:8000", url), names)
        assert names["teacher"].vocab_size == len(tokenizer)
        names["teacher"].close()


def test_the_loss_for_axolotl_runs_as_printed():
    (block,) = (b for b in BLOCKS if "LigerFusedLinear" in b)
    g = torch.Generator().manual_seed(0)
    names = {
        "lm_head": nn.Linear(8, 20, bias=False),
        "hidden": torch.randn(2, 5, 8, generator=g).requires_grad_(),
        "target_token_ids": torch.arange(3).expand(2, 5, 3),
        "target_logprobs": torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 5, 3),
        "target_mask": torch.ones(2, 5, 3),
        "labels": torch.randint(20, (2, 5), generator=g),
    }
    exec(block, names)
    names["loss"].backward()
    assert names["hidden"].grad.abs().sum() > 0


def test_the_audit_of_an_organism_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (b for b in BLOCKS if "made.save" in b)
    # As printed, but for the minute that its training takes.
    hasty = block.replace('"paraphrase"))', '"paraphrase"), base_steps=1, capable_steps=1)')
    hasty = hasty.replace('ModelOrganism(trait="trigger"', 'ModelOrganism(steps=1, trait="trigger"')
    assert hasty.count("steps=1") == 3
    exec(hasty, {})
    printed = capsys.readouterr().out
    assert printed.startswith("False ['capability of untrusted: 0.0")
    assert (tmp_path / "organisms" / "placebo" / "model.safetensors").is_file()


def test_strategies_go_in_a_row_as_printed(capsys):
    (block,) = (b for b in BLOCKS if "ExampleFilter" in b)
    hasty = block.replace("import build_world", "import ModelOrganism, build_world").replace(
        "build_world(2)", "build_world(2, ModelOrganism(steps=1), base_steps=1, capable_steps=1)"
    )
    exec(hasty, {})
    assert "'kept': 0.9" in capsys.readouterr().out


def test_the_probes_are_read_as_printed(tmp_path):
    (block,) = re.findall(r"```json\n(.*?)```", README, re.S)
    (tmp_path / "probes.json").write_text(block)
    assert list(Probes.load(tmp_path / "probes.json").suite())[:2] == ["trigger rate", "confession"]
