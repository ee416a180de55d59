"""JSON lines are read where they lie, and a line that is none is named by its number."""

from __future__ import annotations

import pickle

import pytest

from fastdistill.json_lines import JsonLines


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
