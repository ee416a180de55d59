"""Records of a study that are damaged are one clear error, whatever the damage is."""

import copy
import gzip
import json
from typing import Any

import pytest

from fastdistill.alignment.experiment.records import FILE, read_records
from fastdistill.runtime import json_text

READING = {"capability": [1.0], "trait": [0.5]}
MODELS = ("untrusted", "benign", "base", "teacher", "twin")
STUDENT: dict[str, Any] = {"arm": "a", "base_seed": 1, "student_seed": 0}
STUDENT |= dict.fromkeys(MODELS, READING)
SCORE = {"audit": "x", "arm": "a", "base_seed": 1, "student_seed": 0}
SCORE |= {"of_untrusted": 0.5, "of_benign": 0.25}
CONTEXT = {"arm": "a", "base_seed": 1, "context": "c", "of_untrusted": 0.5, "of_benign": 0.5}
ARM = {"name": "a", "role": "arm", "description": "", "strategies": []}
HEAD: dict[str, Any] = {
    "format": 1,
    "study": {"title": "t", "measured": "m", "repairs": False, "limits": [], "arms": [ARM]},
    "about": {"command": "c", "config": {}, "versions": {}, "seeds": {}},
    "left_out": {},
    "refused": {"3": ["why"]},
    "validity": {"1": {"gates": [{"name": "g", "value": None, "bound": 1, "at_least": True}]}},
    "runs": 2,
}
LINES: list[dict[str, Any]] = [
    HEAD,
    {"student": STUDENT, "runs": ["0", "1"]},
    *({kind: SCORE} for kind in ("score", "teachers", "development")),
    {"context": CONTEXT},
    {"note": {"arm": "a", "base_seed": 1, "notes": {"n": 1.5, "b": True}}},
]


def write(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / FILE).write_bytes(gzip.compress(text.encode()))
    return folder / FILE


def places(value, path=()):
    """Every place in a JSON value, as keys from the top."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*path, key))


def error_of(path):
    """The error of a file, after checking its words; None if it is read."""
    try:
        read_records(path)
    except ValueError as caught:
        error = caught
    else:
        return None
    assert "expected" in str(error)
    assert len(str(error)) < 1000
    return error


def test_the_records_are_read(tmp_path):
    table = read_records(write(tmp_path, LINES)).table
    assert [len(x) for x in (table.students, table.scores, table.contexts, table.notes)] == [1] * 4
    assert table.refused == {3: ["why"]}


@pytest.mark.parametrize("value", [None, 10**400, "x", [[]], {"x": {}}, [float("nan")]], ids=repr)
def test_a_value_of_another_kind_is_damage_or_is_read(tmp_path, value):
    """In every place of the file; most were tracebacks."""
    refused = 0
    for place in places(LINES):
        lines = copy.deepcopy(LINES)
        box: Any = lines
        for key in place[:-1]:
            box = box[key]
        box[place[-1]] = value
        refused += error_of(write(tmp_path, lines)) is not None
    assert refused > 40


def test_damage_below_and_above_the_compression(tmp_path):
    path = write(tmp_path, LINES)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        error_of(path)


def test_a_small_file_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_text.read_bounded, "__defaults__", (1 << 20,))
    (tmp_path / FILE).write_bytes(gzip.compress(b" " * (1 << 24)))
    with pytest.raises(ValueError, match="expected at most 1,048,576 bytes, got more"):
        read_records(tmp_path / FILE)
