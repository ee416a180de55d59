"""Records of what was measured: exact through JSON, and refused in words where they do not fit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from fastdistill.alignment.statistics import Checkpoint, Reading, Student
from helpers.readings_by_hand import reading, student, trained

PAIR = student(3, c=0.8, trait=0.5, audited=0.2)
TRAINED = trained(cs=[0.4, 0.8], traits=[0.1, 0.3])


@pytest.mark.parametrize(
    "record",
    [
        Reading(capability=(1.0, 0.0), trait=(0.1, 1 / 3, math.nextafter(0.5, 1))),
        Reading(capability=(1.0,), trait=(0.25, 0.5), audited=(0.0, 5e-324)),
        Checkpoint(step=7, untrusted=reading(0.5, 0.1), benign=reading(0.4, 0.2)),
        PAIR,
        TRAINED,
    ],
)
def test_records_come_back_as_they_were(record):
    text = json.dumps(record.as_json(), allow_nan=False)
    read = type(record).from_json(json.loads(text))
    assert read == record
    assert json.dumps(read.as_json()) == text


def test_a_reading_takes_arrays_and_keeps_plain_numbers():
    values: dict[str, Any] = {"capability": np.array([1, 0]), "trait": [True, False]}
    reading_here = Reading(**values, audited=cast(Any, np.array([0.5, 1], np.float32)))
    assert reading_here == Reading(capability=(1.0, 0.0), trait=(1.0, 0.0), audited=(0.5, 1.0))
    assert all(type(value) is float for values in vars(reading_here).values() for value in values)


def test_models_that_students_came_from_may_lack_the_audit():
    assert not PAIR.teacher.audited
    audited = replace(PAIR, teacher=reading(1.0, 0.9, 0.1))
    assert Student.from_json(audited.as_json()) == audited


def without(record, *path):
    """The record as JSON, less what is at the path."""
    document = json.loads(json.dumps(record.as_json()))
    at = document
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return document


def with_value(value, *path):
    document = without(TRAINED, *path)
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (without(TRAINED, "arm"), "Student: expected an object with the keys arm, base_seed, stu"),
        (without(TRAINED, "teacher", "trait"), "Reading: expected an object with the keys capab"),
        (TRAINED.as_json() | {"seed": 1}, "Student: expected an object with the keys arm, base_"),
        (with_value([], "base", "trait"), "trait: expected one number per item, got none"),
        (with_value(math.nan, "base", "trait", 3), "trait: expected numbers from 0 to 1, got"),
        (with_value(math.nan, "base", "trait", 3), "nan at item 3"),
        (with_value(1.5, "twin", "capability", 0), "capability: expected numbers from 0 to 1"),
        (with_value(None, "base", "trait", 0), "trait: expected numbers from 0 to 1, got nan"),
        (with_value("no", "base", "trait"), "trait: expected numbers, one per item, got 'no'"),
        (with_value([0.5], "base", "audited"), "audited: expected 20 numbers, one per prompt of t"),
        (with_value(-1, "base_seed"), "base_seed: expected an integer of 0 or more, got -1"),
        (with_value(True, "base_seed"), "base_seed: expected an integer of 0 or more, got Tru"),
        (with_value("0", "student_seed"), "student_seed: expected an integer of 0 or more"),
        (with_value("", "arm"), "arm: expected a name, got ''"),
        (with_value(10, "curve", 1, "step"), "curve: expected increasing steps, got [10, 10]"),
        (with_value([[]], "curve"), "Checkpoint: expected an object with the keys step, untrusted"),
        (with_value(3, "base"), "Reading: expected an object with the keys capability, trait, aud"),
    ],
)
def test_what_json_may_not_hold(record, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Student.from_json(record)


SHORT = Reading(capability=(1.0,) * 20, trait=(0.5,) * 19)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"twin": SHORT}, "twin: expected 20 numbers of trait, as of untrusted, got 19"),
        ({"benign": SHORT}, "readings are paired: measure every model on the same items"),
        (
            {"benign": reading(0.8, 0.1)},
            "benign: expected 20 numbers of audited, as of untrusted, got 0",
        ),
        (
            {"curve": (Checkpoint(step=1, untrusted=SHORT, benign=SHORT),)},
            "step 1: expected 20 numbers of trait, as of untrusted, got 19",
        ),
    ],
)
def test_readings_of_other_items_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(PAIR, **change)


def test_a_reading_has_one_number_per_item():
    with pytest.raises(
        ValueError, match=r"trait: expected one number per item, got shape \[1, 2\]"
    ):
        Reading(capability=(1.0,), trait=cast(Any, ((0.5, 0.5),)))
