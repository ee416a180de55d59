"""Foreign text on a terminal, JSON and regular expressions from outside."""

from __future__ import annotations

import re

import pytest

from fastdistill.runtime.bounded_regex import BoundedPattern, PatternError
from fastdistill.runtime.json_text import JSONError, parse_json, read_json
from fastdistill.runtime.printable import printable


@pytest.mark.parametrize(
    "text",
    ["\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b31m", "\u202eabc", "a\r\nb", "\u2028", "\ud83d", "\x7f"],
)
def test_no_character_acts_on_a_terminal(text):
    line = printable(text)
    assert line.isprintable()
    assert line.encode("utf-8").decode("unicode_escape") == text


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
    with pytest.raises(JSONError, match="x: expected a JSON object, got list"):
        parse_json("[]", "x", dict)


def test_a_file_is_named_and_bounded(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[1, 2]")
    assert read_json(file) == [1, 2]
    with pytest.raises(JSONError, match=r"a\.json: expected at most 3 bytes"):
        read_json(file, max_bytes=3)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*?(?:text|model).*?(?:attn|mlp).*?(?:q|v)_proj.*?",
        r"^(?!.*(lm_head|visual)).*proj$",
        r"\bmodel\.layers\.[\d]{1,2}\.[^.]+\.(q|v)_?proj\Z",
        r"(model|text)(?:\.\w{1,9}){2,5}",
        r"(?=.*attn)[a-z0-9_.]{3,}[^\W\d]",
        r"(?:|m)odel\B.+",
        "",
    ],
)
def test_a_bounded_pattern_matches_what_re_matches(pattern):
    texts = [
        f"{a}.layers.{i}.{b}.{c}"
        for a in ("model", "visual.text", "odel")
        for i in (0, 17)
        for b in ("attn", "mlp")
        for c in ("q_proj", "v_proj", "projection", "attn\n")
    ]
    bounded = BoundedPattern(pattern)
    for text in [*texts, "model", "x", "", "é_proj"]:
        assert bounded.matches(text) == bool(re.fullmatch(pattern, text)), text


def test_a_bounded_pattern_ends():
    """Each would keep the engine of re busy for hours."""
    text = "a" * 200
    assert not BoundedPattern(".*" * 12 + "!").matches(text)
    assert not BoundedPattern("(a|aa){1,99}" * 9 + "!").matches(text)
    assert BoundedPattern("(a{0,99999}){0,99999}").matches(text)
    with pytest.raises(PatternError, match="it takes too many steps"):
        BoundedPattern("(a|aa){1,99}" * 9 + "!", steps=100).matches(text)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(a)\1", "groupref"),
        ("(a)?(?(1)b|c)", "groupref_exists"),
        ("(?<!a)b", "assert_not"),
        ("(?i)a", "flags"),
        ("(?i:a)", "subpattern"),
        ("(a+)+", "a repeat without a bound in another repeat"),
        ("(?:x(b|a*)){2,3}", "a repeat without a bound in another repeat"),
        ("(" * 60 + ")" * 60, "50 deep"),
        ("(" * 9000, "cannot be parsed"),
        ("a{9999999999999999999}", "cannot be parsed"),
        ("[", "cannot be parsed"),
        ("x" * 70000, "70,000 characters"),
    ],
    ids=range(12),
)
def test_a_pattern_that_is_not_matched_is_refused(pattern, words):
    with pytest.raises(PatternError, match=words):
        BoundedPattern(pattern)


@pytest.mark.parametrize("opening", ['{"a":', "["])
@pytest.mark.parametrize("depth", [1, 100, 101, 900, 990, 100_000])
def test_levels_of_json(opening, depth):
    """Functions that call themselves for each level may have less stack than the parser."""
    text = opening * (depth - 1) + "[]" + ("}" if "{" in opening else "]") * (depth - 1)
    for source in (text, text.encode()):
        if depth <= 100:
            assert parse_json(source, "x") is not None
        else:
            with pytest.raises(JSONError, match="x: expected JSON, got one nested too deeply"):
                parse_json(source, "x")


def test_brackets_in_texts_are_no_levels():
    assert parse_json('["' + "[{" * 500 + '"]', "x") == ["[{" * 500]
    assert len(parse_json("[" + ",".join(["[]"] * 500) + "]", "x")) == 500
