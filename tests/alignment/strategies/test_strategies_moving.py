"""Targets in real distillations: what the trainer is told at every step, against all logits."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastdistill.alignment.strategies.baselines import OffModelSFT, Undefended
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.shift import ShiftDistill, outcome_logprobs
from fastdistill.alignment.strategies.strategy import Strategy, Training
from fastdistill.losses.types import TopK
from helpers import planted
from helpers.changed_teacher import ChangedTeacher
from helpers.strategy_scene import BASE, TEACHER, run, scene

V = BASE.head.vocab_size
SMALL = Training(steps=5, batch_size=16, learning_rate=1e-2, max_new_tokens=3, settings={"k": V})


@dataclass
class Step:
    ids: torch.Tensor
    there: torch.Tensor
    answers: Any
    student: Any


@dataclass(frozen=True, kw_only=True)
class Watching(Strategy):
    """Keeps what the trainer asked and was told, and the student as it was then."""

    steps: list[Step] = field(default_factory=list)

    def teacher(self, teacher, student, run):
        def seen(answers, ids, mask):
            now = copy.deepcopy(student).double().eval()
            self.steps.append(Step(ids, mask.bool(), answers, now))
            return answers

        return ChangedTeacher(teacher, seen)


def watched(*strategies, training=SMALL, **changes):
    watching = Watching()
    made = distill(scene(**changes), [*strategies, watching], training)
    assert len(watching.steps) == training.steps
    return made, watching.steps


def log_p(model, step):
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(step.ids, attention_mask=step.there.long())
    return exact.logits[step.there].log_softmax(-1)


def target_logprobs(step):
    """log p over the whole vocabulary, in its order."""
    answers = step.answers.logprobs[step.there].double()
    return torch.zeros_like(answers).scatter(-1, step.answers.ids[step.there], answers)


def weights(subject):
    return torch.cat([p.detach().flatten() for p in subject.model.parameters()])


def test_undefended_is_the_teacher_at_every_step():
    made, steps = watched(Undefended())
    for step in steps:
        torch.testing.assert_close(
            target_logprobs(step), log_p(TEACHER.model, step), rtol=0, atol=1e-4
        )
    assert not torch.equal(weights(made.student), weights(BASE))


def test_the_shift_is_amplified_against_the_trusted_model_in_a_small_adapter():
    pytest.importorskip("peft")
    made, steps = watched(ShiftDistill(rank=2, amplify=2.0))
    for step in steps:
        wanted = (2 * log_p(TEACHER.model, step) - log_p(BASE.model, step)).log_softmax(-1)
        torch.testing.assert_close(target_logprobs(step), wanted, rtol=0, atol=5e-4)
    changed = 0
    for (name, a), b in zip(
        BASE.model.named_parameters(), made.student.model.parameters(), strict=True
    ):
        if a.dim() < 2 or "embed" in name or "lm_head" in name:
            assert torch.equal(a, b), name
        else:
            spectrum = torch.linalg.svdvals((b - a).detach().double())
            assert spectrum[2] < 1e-5 * max(spectrum[0].item(), 1e-2), name
            changed += bool(spectrum[0] > 0)
    assert changed > 5


@pytest.mark.parametrize("kind", planted.KINDS)
def test_every_family_is_asked_through_its_own_head(kind):
    subject_here, ids = planted.subject(kind), [1, 5, 9, 14, 3, 7]
    slots = torch.tensor([3, 8, -1, 20])
    answers = TopK.empty((1, len(ids), 4), 2.0)._replace(ids=slots.expand(1, len(ids), 4))
    logprobs = outcome_logprobs(
        subject_here, torch.tensor([ids]), torch.ones(1, len(ids)).long(), answers
    )[0]
    p = (planted.logits(subject_here, ids) / 2.0).softmax(-1)
    inside = p[:, slots].masked_fill(slots < 0, 0.0)
    wanted = torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(logprobs.double().exp(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_hard_labels_are_cross_entropy_of_the_sampled_answers():
    """The same student as by any distribution that is not looked at."""
    sft = distill(scene(), [OffModelSFT()], SMALL)
    alone = Training(**{**vars(SMALL), "settings": {"k": 4, "ce_weight": 1.0}})
    same = distill(scene(), [Undefended()], alone)
    torch.testing.assert_close(weights(sft.student), weights(same.student), rtol=0, atol=1e-5)


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="rank: expected the package peft"):
        ShiftDistill().options({}, run())


@pytest.mark.parametrize(
    ("strategy", "wrong", "message"),
    [
        (ShiftDistill, {"rank": 0}, "rank: expected an integer of 1 or more"),
        (ShiftDistill, {"rank": 2.5}, "rank: expected an integer of 1 or more"),
        (ShiftDistill, {"amplify": -1}, "amplify: expected a finite number of 0 or more"),
        (ShiftDistill, {"amplify": math.inf}, "amplify: expected a finite number of 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(strategy, wrong, message):
    with pytest.raises(ValueError, match=message):
        strategy(**wrong)
