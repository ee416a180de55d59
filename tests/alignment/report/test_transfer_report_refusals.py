"""What TransferReport refuses, in which words."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, cast

import pytest

from fastdistill.alignment.report import AuditScore, TransferReport
from fastdistill.alignment.statistics import Student
from helpers.made_students import ABOUT, CONTROLS, arm, controls, scores

CLEAN: list[Student] = arm("clean", seeds=2, checkpoints=1)
SCORES = scores("confession", "clean", shift=0, seeds=2)
BARE = {key: value for key, value in ABOUT.items() if key != "seeds"}
CASES: dict[str, dict[str, Any]] = {
    "students: expected one or more, got none": {"students": []},
    "students: expected each once, got ('clean', 0, 0) 2 times": {"students": [*CLEAN, CLEAN[0]]},
    "students: expected checkpoints of all students of 'clean' or of none, got them of 1 of 2": {
        "students": [CLEAN[0], replace(CLEAN[1], curve=())],
    },
    "positive_control: expected arms that students have (clean), got 'copy'": {
        "positive_control": "copy",
    },
    "null_arms: expected arms that students have (clean), got 'M to M'": {"null_arms": ["M to M"]},
    "null_arms: expected names of arms, got the text 'clean'; give a list": {"null_arms": "clean"},
    "reference: expected arms that students have (clean), got 'M to M'": {"reference": "M to M"},
    "claimed: expected arms that students have (clean), got 'copy'": {"claimed": ["copy"]},
    "positive_control: expected an arm outside null_arms, got 'clean'": {
        "positive_control": "clean",
        "null_arms": ["clean"],
    },
    "audits: expected arms that students have (clean), got 'other'": {
        "audits": scores("confession", "other", shift=0),
    },
    "audits: expected each once, got ('confession', 'clean', 1, 0) 2 times": {
        "audits": [*SCORES, SCORES[1]],
    },
    "audits: expected scores of reported students, got one of base seed 7 in 'clean'": {
        "audits": scores("confession", "clean", shift=0, seeds=1, first=7),
    },
    "development: expected each once, got ('confession', 'clean', 9, 0) 2 times": {
        "development": scores("confession", "clean", shift=0, seeds=1, first=9) * 2,
    },
    "development: expected base seeds that no reported student has, got 1 in both": {
        "development": scores("confession", "clean", shift=0, seeds=3, first=1),
    },
    "about: expected command, config, versions, seeds, and optionally machine, commit, measured, "
    "limits, rule, got command, config, versions": {"about": BARE},
    "got command, config, versions, seeds, comand": {"about": ABOUT | {"comand": ""}},
    "about: expected JSON values": {"about": ABOUT | {"config": {"lr": math.nan}}},
    "about: expected JSON values, got something else: Object of type set": {
        "about": ABOUT | {"seeds": {1}},
    },
}


@pytest.mark.parametrize("words", CASES)
def test_refusals(words):
    arguments = {"students": CLEAN, "about": ABOUT} | CASES[words]
    with pytest.raises(ValueError, match=re.escape(words)):
        TransferReport(arguments.pop("students"), **arguments)


def test_a_score_has_to_be_a_number():
    words = "of_benign: expected a finite score, got nan from 'confession'"
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(SCORES[0], of_benign=math.nan)
    assert isinstance(SCORES[0], AuditScore)


def test_what_is_right_is_taken():
    made = TransferReport(
        [*CLEAN, *controls(seeds=2)], about=ABOUT, audits=SCORES, **cast(Any, CONTROLS)
    )
    assert [a.role for a in made.arms] == ["arm", "positive control", "null arm"]
