"""The benchmark of a training step compares the same loss, and refuses to report another."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import train_step
from benchmarks.registry import BrokenPeer, GateError, Missing
from benchmarks.shapes import Shape
from helpers.pinned import is_as_pinned
from helpers.present import present

SMALL = Shape(N=64, H=32, V=300, K=8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_step, "ROW", 16)
    monkeypatch.setattr(train_step, "LAYERS", 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_rows_are_of_the_same_loss():
    by_name = {(row.op, row.impl): row for row in train_step.rows(SMALL)}
    assert [name for op, name in by_name if op == "train_step"] == [
        "materialised",
        "ours",
        "ours, recompute",
    ]
    for (_, name), row in by_name.items():
        if row.missing:
            assert name == "TRL GKDTrainer"
            assert not is_as_pinned("trl"), row.reason
            continue
        assert present(row.ms_median) > 0
        assert present(row.peak_mb) > 0
        if name in train_step.SAME_LOSS:
            assert present(row.grad_error) < 1e-5
    held = 1e6 * present(by_name["train_step", "ours"].output_mb)
    model = train_step._llama(SMALL, 0)
    assert held == 3 * sum(p.nbytes for p in model.parameters())


def test_a_trl_without_its_trainer_is_named(monkeypatch, tmp_path):
    """Installed and broken is no "not installed": the row says what is lacking."""
    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    broken = BrokenPeer if is_as_pinned("trl") else Missing
    with pytest.raises(broken, match="trl"):
        train_step.gkd_trainer(None, None, str(tmp_path))


def test_another_loss_is_refused(monkeypatch):
    class Wrong(train_step.StoredTeacher):
        def topk(self, *args, **kwargs):
            answers = super().topk(*args, **kwargs)
            return answers._replace(ids=(answers.ids + 1) % SMALL.V)

    monkeypatch.setattr(train_step, "StoredTeacher", Wrong)
    with pytest.raises(GateError, match="the gradient of ours is"):
        train_step.rows(SMALL)


@pytest.mark.slow
def test_memory_is_what_a_step_adds():
    """The materialised step holds at least the logits; torch's allocator is asked, not the OS."""
    rows = train_step.rows(SMALL)
    assert present(rows[0].peak_mb) > 2 * SMALL.N * SMALL.V * 4 / 1e6
    assert not torch.cuda.is_available() or present(rows[0].timer).startswith("CUDA")
