"""Foreign text on a terminal, and JSON from outside."""

from __future__ import annotations

import pytest

from fastdistill.runtime.json_text import JSONError, parse_json, read_json
from fastdistill.runtime.printable import printable


@pytest.mark.parametrize(
    "text",
    ["\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b31m", "\u202eabc", "a\r\nb", "\u2028", "\ud83d", "\x7f"],
)
def test_no_character_acts_on_a_terminal(text):
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("unicode_escape") == text


def test_plain_text_of_any_script_stays():
    text = "größer τ ≤ 1 中文 🙂 naïve"
    assert printable(text) == text


def test_long_text_is_cut():
    assert printable("x" * 400) == "x" * 300 + "…"
    assert printable("x" * 400, None) == "x" * 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "{", b"\xff\xfe", "1" * 10_000, ""]
)
def test_every_fault_of_json_names_its_source(text):
    with pytest.raises(JSONError, match=r"there\.json: expected JSON, got"):
        parse_json(text, "there.json")


def test_the_type_is_checked():
    assert parse_json('{"a": 1}', "x", dict) == {"a": 1}
    with pytest.raises(JSONError, match="x: expected an object, got list"):
        parse_json("[]", "x", dict)


def test_a_file_is_named_and_bounded(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[1, 2]")
    assert read_json(file) == [1, 2]
    with pytest.raises(JSONError, match=r"a\.json: expected at most 3 bytes"):
        read_json(file, max_bytes=3)
