"""The README's Python runs as printed and keeps its budget; so do blocks of docs/ that need help.

tests/test_docs.py runs all other blocks of docs/.
"""

import importlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdistill import Teacher
from fastdistill.alignment.audits import Probes
from fastdistill.alignment.experiment.checkpoint_source import CheckpointSource
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from helpers.cases import case
from helpers.present import present
from helpers.served import ours
from helpers.trl_scene import TALKS, settings
from helpers.trl_scene import model as small

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """The Python of a page, also of `no-run` blocks, which run here with small models."""
    return re.findall(r"```python(?: no-run)?\n(.*?)```", text, re.S)


def page(name: str) -> list[str]:
    return blocks((DOCS / name).read_text(encoding="utf-8"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


def test_the_extras_that_the_pages_name_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.M))
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"'(?:\.|fastdistill)\[(\w+)\]'", text))
    assert {"report", "serve", "all"} <= named <= extras


def test_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", README)
    assert targets
    assert [t for t in targets if "://" not in t and not (ROOT / t).exists()] == []


def test_the_losses_run_as_printed():
    c = case(torch.float32, V=200)
    lm_head = nn.Linear(16, 200, bias=False)
    names: dict[str, Any] = {
        "hidden": c.hidden.requires_grad_(),
        "lm_head": lm_head,
        "labels": c.labels,
        "teacher_hidden": c.hidden.detach() * 1.1,
        "teacher_head": c.weight,
    }
    before, after, sparse = (b for b in blocks(README) if "lm_head" in b)
    exec(before, names)
    materialized = present(lm_head.weight.grad).clone()
    lm_head.weight.grad = None
    exec(after, names)
    torch.testing.assert_close(lm_head.weight.grad, materialized)  # the loss that it replaces
    exec(sparse, names)
    assert names["scores"].entropy.shape == names["labels"].shape


def test_the_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.peers
@pytest.mark.parametrize("config", ["GKDConfig", "DistillationConfig"])
def test_trls_trainers_run_as_printed(tmp_path, monkeypatch, config):
    pytest.importorskip("trl")
    gkd = importlib.import_module("trl.experimental.gkd")
    trl = importlib.import_module("trl")
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
        "short": settings(kind, "out", max_steps=1, **more),
    }
    (block,) = (b for b in page("integrations/trl.md") if f" {config}(" in b)
    assert f' {config}("out"),' in block
    exec(block.replace(f' {config}("out"),', " short,"), names)
    assert names[config] is kind
    assert names["trainer"].state.global_step == 1


def test_a_served_teacher_runs_as_printed():
    (block,) = page("teachers/served.md")
    tokenizer = shipped_teacher()[1]
    names: dict[str, Any] = {}
    with ours(Teacher(small(tokenizer, 7, hidden=48))) as url:
        exec(block.replace("http://127.0.0.1:8000", url), names)
        assert names["teacher"].vocab_size == len(tokenizer)
        names["teacher"].close()


@pytest.mark.slow
def test_the_audit_of_an_organism_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = page("audits/organisms.md")
    # As printed, but for the minute that its training takes.
    hasty = block.replace('"paraphrase"))', '"paraphrase"), base_steps=1, capable_steps=1)')
    hasty = hasty.replace('ModelOrganism(trait="trigger"', 'ModelOrganism(steps=1, trait="trigger"')
    assert hasty.count("steps=1") == 3
    exec(hasty, {})
    printed = capsys.readouterr().out
    assert printed.startswith("False ['capability of untrusted: 0.0")
    assert (tmp_path / "organisms" / "placebo" / "model.safetensors").is_file()


@pytest.mark.slow
def test_strategies_go_in_a_row_as_printed(capsys):
    (block,) = page("studies/overview.md")
    hasty = block.replace("import build_world", "import ModelOrganism, build_world").replace(
        "build_world(2)", "build_world(2, ModelOrganism(steps=1), base_steps=1, capable_steps=1)"
    )
    exec(hasty, {})
    assert "'kept': 0.9" in capsys.readouterr().out


def test_the_teacher_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = shipped_teacher()[1]
    tokenizer.save_pretrained("teacher")
    small(tokenizer, 0).save_pretrained("teacher")
    small(tokenizer, 1).save_pretrained("run")
    rows = [json.dumps({"text": f"def f{i}(x): return x + {i}"}) for i in range(8)]
    Path("held-out.jsonl").write_text("\n".join(rows))
    (block,) = (b for b in blocks(README) if "load_teacher" in b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a random student is near a random teacher
        warnings.simplefilter("ignore", ResourceWarning)  # the block leaves a file to its end
        exec(block, {})
    (printed,) = re.findall(r"```text\n(.*?)\n```", README, re.S)
    form, ours = (re.sub(r"[\d.,e-]+", "0", t) for t in (printed, capsys.readouterr().out))
    assert form.split() == ours.split()


def json_blocks(name: str) -> list[str]:
    return re.findall(r"```json\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)


def test_the_probes_are_read_as_printed(tmp_path):
    probes = [b for b in json_blocks("audits/probes.md") if b.startswith('{"prompts"')]
    suites = []
    for block in probes:
        (tmp_path / "probes.json").write_text(block)
        suites.append(list(Probes.load(tmp_path / "probes.json").suite()))
    trigger, preference, prefilled, sandbagging = suites
    assert trigger[:2] == ["trigger rate", "confession"]
    assert preference[:2] == ["preference", "context gap"]
    assert prefilled[0] == "preference"
    assert "style restore" in sandbagging


def test_pool_and_capability_lines_are_read_as_printed(tmp_path):
    names = ("pool", "text", "capability")
    for name, block in zip(names, json_blocks("audits/probes.md")[-3:], strict=True):
        (tmp_path / f"{name}.jsonl").write_text(block)
    (tmp_path / "probes.json").write_text(json_blocks("audits/probes.md")[1])
    source = CheckpointSource(
        teacher="owner/teacher",
        base="owner/base",
        pool=tmp_path / "pool.jsonl",
        probes=tmp_path / "probes.json",
        capability=tmp_path / "capability.jsonl",
        text=tmp_path / "text.jsonl",
    )
    assert source.prompts == 2
    assert source.features >= {"goals", "shown"}


def test_the_page_of_audits_names_the_keys_that_each_needs():
    """The keys after `Needs` enable the audit; with one of them missing it does not run."""
    texts = {"target", "favourite", "rest"}
    lists = {"options": ["a", "b"], "prefilled": [{"user": "a", "prefill": "b"}]}
    body = (DOCS / "audits" / "seventeen.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+?)\n.*?^- \*\*Needs\*\*: ([^(\n]*)", body, re.M | re.S)
    assert len(sections) == 17
    for title, needs in sections:
        for keys in (re.findall(r"`(\w+)`", choice) for choice in needs.split("; or")):
            record = {k: "a" if k in texts else lists.get(k, ["a"] * 32) for k in keys}
            assert is_enabled(title, record), (title, keys)
            for key in keys:
                fewer = {k: v for k, v in record.items() if k != key}
                assert not is_enabled(title, fewer), (title, keys, key)


def is_enabled(title: str, record: dict) -> bool:
    try:
        suite = Probes(**record).suite()
    except ValueError:  # a key without the one that it belongs to
        return False
    return title.lower() in {name.lower() for name in suite}
