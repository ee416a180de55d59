"""The picture of docs/benchmarks/cpu.md shows the committed rows."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.readme_plot import GROUPS, PICTURE, shares, write


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)</text>", svg)


def test_the_committed_picture_has_the_figures_of_the_committed_rows():
    expected = [f"{x:.2f}" for group in GROUPS for pair in shares(group) for x in pair]
    drawn = texts(PICTURE.read_text(encoding="utf-8"))
    assert sorted(text for text in drawn if re.fullmatch(r"\d\.\d\d", text)) == sorted(expected)
    assert "not measured" not in drawn
    assert {name for group in GROUPS for name, _ in group.bars} <= set(drawn)


def test_the_picture_follows_the_rows(tmp_path):
    for group in GROUPS:
        rows = [
            {
                "op": g.op,
                "dtype": g.dtype,
                "impl": impl,
                "ms_median": 100.0 if i == 0 else 73.0,
                "peak_mb": 100.0 if i == 0 else 41.0,
            }
            for g in GROUPS
            if g.file == group.file
            for i, (_, impl) in enumerate(g.bars)
        ]
        (tmp_path / f"{group.file}.json").write_text(json.dumps(rows))
    drawn = texts(write(tmp_path / "picture.svg", tmp_path).read_text())
    bars = [impl for group in GROUPS for _, impl in group.bars[1:]]
    assert drawn.count("0.73") == drawn.count("0.41") == len(bars)


def test_a_row_that_is_missing_is_an_error(tmp_path):
    (tmp_path / "sparse_loss.json").write_text("[]")
    with pytest.raises(ValueError, match="expected rows of topk_loss by eager, compiled"):
        shares(GROUPS[0], tmp_path)
