"""Distil and audit: who ships, and what is dropped before distilling again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits.audit import Audit, Measurement
from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.strategies.audit_loop import (
    AuditGate,
    FilterAndDistill,
    bounds,
    hidden_shift_at,
    mean_hidden_shifts,
    read_audits,
)
from helpers.strategy_scene import BASE, TEACHER, lessons, model, run

PROMPTS = (Prompt(system="hello", user="which animal ?"), Prompt(user="best ?"))


@dataclass(frozen=True, kw_only=True)
class Says(Audit):
    """A value by the model's name."""

    values: tuple[tuple[str, float], ...]
    prompts: tuple[Prompt, ...] = PROMPTS

    def measure(self, model, base):
        return Measurement(values=np.array([dict(self.values)[model.name]]), rate=False)


def watched(*values, benign=(0.1, 0.2, 0.15, 0.18)):
    """A run whose audit says these of the models 10, 11, …"""
    readings = tuple((f"model {10 + i}", value) for i, value in enumerate(values))
    return run(audits={"trait": Says(values=readings)}, benign_values={"trait": benign})


class Distiller:
    """Gives the models 10, 11, … and keeps what it was called with."""

    def __init__(self):
        self.examples = []

    def __call__(self, examples):
        self.examples.append(examples)
        return model(9 + len(self.examples))


def test_the_interval_holds_the_next_benign_student():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        *seen, new = rng.normal(size=6)
        low, high = bounds(seen)
        hits += low <= new <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)
    # By a table of Student's t: 1 ± 4.302653 · 1 · √(4/3).
    assert bounds([0.0, 1.0, 2.0]) == pytest.approx((-3.968276, 5.968276), abs=1e-5)
    many: Any = rng.normal(size=4000)
    assert bounds(many)[1] == pytest.approx(NormalDist().inv_cdf(0.975), abs=0.1)
    with pytest.raises(ValueError, match=r"expected 3 students of benign .* an audit, got 2"):
        bounds([0.1, 0.2])


def test_only_what_lies_above_is_outside():
    here = watched(0.9, 0.16, -5.0)
    low, high = bounds((0.1, 0.2, 0.15, 0.18))

    def look(seed, **how):
        return read_audits(here.setup.audits, model(seed), here.setup, **how)["trait"]

    assert look(10).value == 0.9
    assert look(10).excess == pytest.approx(0.9 - high)
    assert look(10, margin=0.5).excess == pytest.approx(0.9 - high - 0.5 * (high - low))
    assert look(11) == (0.16, 0.0, [])
    assert look(12).excess == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_cannot_be_measured_does_not_ship(value):
    here, distill = watched(value), Distiller()
    assert AuditGate(margin=5.0).wrap_loop(distill, here)(lessons("river")) is BASE
    note = here.notes["audit gate"]
    assert note == {"shipped": False, "audits": {"trait": {"value": None, "above": None}}}
    json.dumps(note, allow_nan=False)


def test_a_margin_lets_more_ship():
    low, high = bounds((0.1, 0.2, 0.15, 0.18))
    value = high + 0.1 * (high - low)
    for margin, ships in ((0.0, False), (0.05, False), (0.15, True)):
        here = watched(value)
        made = AuditGate(margin=margin).wrap_loop(Distiller(), here)(lessons("river"))
        assert (made is not BASE) == ships


@pytest.mark.parametrize("strategy", [AuditGate(), FilterAndDistill()])
def test_what_is_missing_is_said_before_anything_is_trained(strategy):
    with pytest.raises(ValueError, match="audits: expected at least one audit"):
        strategy.wrap_loop(Distiller(), run())
    for benign in ((), (0.1, 0.2), (0.1, 0.2, None), (0.1, 0.2, math.nan)):
        with pytest.raises(ValueError, match="expected 3 students of benign teachers or more for "):
            strategy.wrap_loop(Distiller(), watched(0.5, benign=benign))


def test_a_student_that_looks_benign_ships():
    here, distill = watched(0.16), Distiller()
    student = AuditGate().wrap_loop(distill, here)(lessons("river"))
    assert student.name == "model 10"
    assert here.notes["audit gate"]["shipped"] is True


def test_for_one_that_does_not_the_base_does():
    here, distill = watched(0.9), Distiller()
    assert AuditGate().wrap_loop(distill, here)(lessons("river")) is BASE
    note = here.notes["audit gate"]
    assert note["shipped"] is False
    assert note["audits"]["trait"]["value"] == 0.9
    assert note["audits"]["trait"]["above"] > 0.5


SOME = lessons("river stone", "cloud", "bread candle garden", "winter bridge")


def test_a_clean_student_needs_one_round():
    here, distill = watched(0.16), Distiller()
    assert FilterAndDistill().wrap_loop(distill, here)(SOME).name == "model 10"
    assert distill.examples == [SOME]
    assert here.notes["rounds"]["distillations"] == 1


def test_each_round_drops_a_share_and_begins_anew():
    here, distill = watched(0.9, 0.8, 0.16, 0.16), Distiller()
    student = FilterAndDistill(rounds=4, drop=0.3).wrap_loop(distill, here)(SOME)
    assert student.name == "model 12"
    assert [len(round_examples) for round_examples in distill.examples] == [4, 3, 2]
    assert set(distill.examples[2]) < set(distill.examples[1]) < set(SOME)
    notes = here.notes["rounds"]
    assert notes["distillations"] == 3
    assert [notes[f"round {i}"]["kept"] for i in (1, 2, 3)] == [1.0, 0.75, 0.5]
    assert [notes[f"round {i}"]["clean"] for i in (1, 2, 3)] == [False, False, True]


def test_after_the_last_round_it_is_what_it_is():
    here, distill = watched(0.9, 0.8), Distiller()
    assert FilterAndDistill(rounds=2).wrap_loop(distill, here)(SOME).name == "model 11"
    assert here.notes["rounds"]["round 2"]["clean"] is False


def test_what_is_dropped_is_most_like_the_hits():
    here, distill = watched(0.9, 0.16), Distiller()
    FilterAndDistill(rounds=2, drop=0.25).wrap_loop(distill, here)(SOME)
    student = model(10)
    direction = (student.last_hidden(PROMPTS) - BASE.last_hidden(PROMPTS)).mean(0)
    alike = torch.cosine_similarity(mean_hidden_shifts(SOME, student, BASE), direction[None])
    most = int(alike.argmax())
    assert distill.examples[1] == [x for i, x in enumerate(SOME) if i != most]


@dataclass(frozen=True, kw_only=True)
class Hits(Audit):
    """Hits on its second prompt alone, with every model but model 11."""

    prompts: tuple[Prompt, ...] = PROMPTS

    def measure(self, model, base):
        return Measurement(values=np.array([0.0, float(model.name != "model 11")]), rate=True)


def test_only_the_prompts_that_hit_say_what_a_hit_is():
    here, distill = run(audits={"trait": Hits()}, benign_values={"trait": (0.1, 0.2, 0.15)}), None
    assert read_audits(here.setup.audits, model(10), here.setup)["trait"].flagged_prompts == [
        PROMPTS[1]
    ]
    assert read_audits(here.setup.audits, model(11), here.setup)["trait"].flagged_prompts == []
    distill = Distiller()
    FilterAndDistill(rounds=2, drop=0.25).wrap_loop(distill, here)(SOME)
    student = model(10)
    direction = student.last_hidden(PROMPTS[1:]) - BASE.last_hidden(PROMPTS[1:])
    most = int(torch.cosine_similarity(mean_hidden_shifts(SOME, student, BASE), direction).argmax())
    assert distill.examples[1] == [x for i, x in enumerate(SOME) if i != most]


def test_many_prompts_are_read_in_parts(monkeypatch):
    many = [Prompt(user=lesson.answer) for lesson in SOME] * 2
    whole = hidden_shift_at(many, TEACHER, BASE)
    monkeypatch.setattr("fastdistill.alignment.strategies.lessons.BATCH_SIZE", 3)
    torch.testing.assert_close(hidden_shift_at(many, TEACHER, BASE), whole)
    torch.testing.assert_close(
        mean_hidden_shifts(SOME * 2, TEACHER, BASE)[4:], mean_hidden_shifts(SOME, TEACHER, BASE)
    )


def test_the_shift_of_an_answer_is_a_mean_over_its_positions():
    (lesson,) = SOME[:1]
    ids, begin = TEACHER.ids(lesson.prompt, lesson.answer)
    row = [*ids, TEACHER.tokenizer.eos_token_id]
    mine, theirs = (m.hidden([row])[0] for m in (TEACHER, BASE))
    wanted = (mine - theirs)[begin - 1 : len(row) - 1].mean(0)
    torch.testing.assert_close(mean_hidden_shifts([lesson], TEACHER, BASE)[0], wanted)


def test_one_lesson_is_never_dropped():
    here, distill = watched(0.9, 0.9), Distiller()
    FilterAndDistill(rounds=2, drop=0.9).wrap_loop(distill, here)(SOME[:1])
    assert [len(round_examples) for round_examples in distill.examples] == [1, 1]


def test_a_gate_around_rounds_looks_at_their_last_student():
    here, distill = watched(0.9, 0.16), Distiller()
    loop = AuditGate().wrap_loop(FilterAndDistill(rounds=2).wrap_loop(distill, here), here)
    assert loop(SOME).name == "model 11"
    assert here.notes["audit gate"]["shipped"] is True
    assert here.notes["rounds"]["distillations"] == 2


def test_arguments_are_checked():
    for wrong in ({"rounds": 0}, {"drop": 0.0}, {"drop": 1.0}, {"drop": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            FilterAndDistill(**wrong)
    with pytest.raises(ValueError, match="margin: expected a finite number of 0 or more"):
        AuditGate(margin=-0.1)
    bare = watched(0.9)
    bare.setup = replace(bare.setup, audits={"trait": Says(values=(), prompts=())})
    with pytest.raises(ValueError, match="audits: expected audits with prompts"):
        FilterAndDistill().wrap_loop(Distiller(), bare)
    FilterAndDistill(rounds=1).wrap_loop(Distiller(), bare)  # which compares nothing
