"""YAML that was made to break its reader is one clear error, and takes no time."""

import time

import pytest

from fastdistill.runtime.yaml_text import MAX_LENGTH, parse_yaml

_ALIASES = "{1}: &{1} [*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]\n"
_NAMES = ("abcdef", "bcdefg")


def test_the_core_schema():
    text = "a: 1e-4\nb: no\nc: [true, ~, 0x1F, 012]\nd: 2020-01-02\ne: !!float 3\nf: !!str 4"
    expected = {"a": 1e-4, "b": "no", "c": [True, None, "0x1F", 12], "d": "2020-01-02"}
    assert parse_yaml(text, "x") == expected | {"e": 3.0, "f": "4"}
    assert parse_yaml("", "x") is None


@pytest.mark.parametrize(
    "text",
    [
        *("a: !!int ent", "a: !!int [1]", "a: !!int ''", "a: !!float {}", "a: !!bool maybe"),
        *("a: !!timestamp x", "a: !!timestamp 2020-99-99", "a: !!set x", "a: !!omap [1]"),
        *("a: !!binary é", "a: !!python/name:os.system x", "? [x]\n: 1", "a: !!int " + "9" * 5000),
        *("a: [", "a: *b", "\x00", "a: 1\na: 2", "a: \x1b[2J: ["),
    ],
)
def test_what_is_no_yaml_of_the_core_schema(text):
    with pytest.raises(ValueError, match="x: expected ") as caught:
        parse_yaml(text, "x")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "at most 32 levels"),
        ("- " * 60_000, "at most 32 levels"),
        ("a: 1\n" + ("[" * 400 + "]" * 400 + "\n") * 200, "expected YAML|32 levels"),
        ("[" + ("[" * 400 + "]" * 400 + ",\n") * 300 + "]", "at most 32 levels"),
        ("x" * (MAX_LENGTH + 1), "at most 262,144 characters, got 262,145"),
        ("a: &a [x, x]\n" + "".join(map(_ALIASES.format, *_NAMES)), "at most 100,000 values"),
    ],
    ids=["flow", "block", "a document and more", "groups", "long", "bomb"],
)
def test_deep_and_large_documents(text, words):
    start = time.process_time()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text, "x")
    assert time.process_time() - start < 5  # the groups took 50 s a megabyte
