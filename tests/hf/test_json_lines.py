"""JSON lines are read where they lie, and a line that is none is named by its number."""

from __future__ import annotations

import json
import pickle
from typing import Any, cast

import pytest

from fastdistill.hf.encoder import Encoder, check_example
from fastdistill.hf.jsonl import JsonLines
from helpers.example_texts import tokenizer


def written(tmp_path, data: bytes, name: str = "d.jsonl"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def test_lines_in_any_order(tmp_path):
    text = '{"text": "a"}\n\n{"text": "ü — 漢"}\r\n   \n{"input_ids": [1, 2]}'
    lines = JsonLines(written(tmp_path, text.encode()))
    expected = [{"text": "a"}, {"text": "ü — 漢"}, {"input_ids": [1, 2]}]
    assert [lines[i] for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    assert list(pickle.loads(pickle.dumps(lines))) == expected  # iteration ends by IndexError
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"", "d.jsonl", "data: expected JSON lines, got none"),
        (b"\n \n", "d.jsonl", "data: expected JSON lines, got none"),
        (b"hello\n", "d.jsonl", r"expected line 1 of .*d\.jsonl to be JSON, got hello"),
        (b"\n[1]\n", "d.jsonl", "expected line 2 of .* to be a JSON object, got \\[1\\]"),
        (b'{"text": "a"}', "d.parquet", r"expected a file of JSON lines \(\.jsonl\)"),
    ],
)
def test_what_is_none(tmp_path, data, name, words):
    with pytest.raises(ValueError, match=words):
        JsonLines(written(tmp_path, data, name))


def test_a_line_further_down(tmp_path):
    data = b'{"text": "a"}\n\n' + b'"x' * 99
    with pytest.raises(ValueError, match=r"eval_data: expected line 3 .* got .{57}\.\.\. \("):
        JsonLines(written(tmp_path, data), "eval_data")
    with pytest.raises(ValueError, match="data: expected a file"):
        JsonLines(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut \\ud83d"}', "to hold texts, got half of a surrogate pair"),
        (b'{"prompt": "a", "completion": "\\uDC00"}', "to hold texts, got half of a surrogate"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d!"}]}', "to hold texts, got half"),
        (b'{"\\ud83d": 1}', "to hold texts, got half"),
        (b"[" * 100_000, "to be JSON, got .*nested too deeply"),
        (b'{"text": "\xff"}', "to be JSON, got"),
        (b'{"text": "a"', "to be JSON, got"),
        (b"null", "to be a JSON object, got null"),
        (b'{"text": "a", "text": "b"}', r"to be JSON, got .* .*got 'text' twice"),
        (
            b'{"text": "a", "x": [{"y": 1, "y": 1}]}',
            r"to be JSON, got .* .*got 'y' twice",
        ),
    ],
)
def test_lines_are_looked_at_when_the_file_is_opened(tmp_path, line, words):
    file = written(tmp_path, b'{"text": "a"}\n' * 99 + line + b'\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=rf"data: expected line 100 of .*d\.jsonl {words}"):
        JsonLines(file)


def test_whole_pairs_and_escapes_are_texts(tmp_path):
    lines = JsonLines(written(tmp_path, b'{"text": "\\ud83d\\ude00"}\n{"text": "\\\\ud83d"}\n'))
    assert [line["text"] for line in cast(Any, lines)] == ["\U0001f600", "\\ud83d"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": 5}, "text: expected a text, got int 5"),
        ({"text": None}, "expected dicts with"),
        ({"input_ids": {"0": 1}}, "input_ids: expected a list of integers, got dict"),
        ({"input_ids": "abc"}, "input_ids: expected a list of integers, got str"),
        ({"input_ids": [5, 6], "position_ids": [0, 0]}, "position_ids: expected 0, 1, 2"),
        ({"text": "a", "images": [[1, 2]]}, "images: expected only columns that are read"),
        ({"messages": "hello"}, "messages: expected a list of messages"),
    ],
)
def test_examples_of_the_wrong_type_are_named_with_file_and_line(tmp_path, line, words):
    data = b'{"text": "a"}\n\n' + json.dumps(line).encode() + b"\n"
    file = written(tmp_path, data)
    with pytest.raises(ValueError, match=rf"eval_data: .*{words}.*\(line 3 of .*d\.jsonl\)"):
        JsonLines(file, "eval_data", check_example)
    with pytest.raises((ValueError, TypeError), match=rf"{words}.*\(line 3 of .*d\.jsonl\)"):
        Encoder(tokenizer=tokenizer())(JsonLines(file)[1])


def test_what_a_tokenizer_says_names_file_and_line(tmp_path):
    class Broken:
        def __call__(self, text, **options):
            raise RuntimeError("no")

    lines = JsonLines(written(tmp_path, b'{"text": "a"}\n{"text": "b"}\n'))
    copies = pickle.loads(pickle.dumps([lines[0], lines[1]]))  # as a worker gets them
    with pytest.raises(
        ValueError, match=r"text: expected .* RuntimeError: no \(line 2 of .*d.jsonl"
    ):
        Encoder(tokenizer=Broken())(copies[1])
