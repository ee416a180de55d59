"""The benchmark of attention on a CPU."""

from benchmarks import attention
from benchmarks.shapes import GATE


def test_sdpa_next_to_eager():
    rows = attention.rows(GATE)
    assert [row.impl for row in rows] == ["sdpa", "eager"] * 4
    assert {(row.mode, row.dtype) for row in rows} == {
        (mode, dtype) for mode in ("forward", "both") for dtype in ("float32", "bfloat16")
    }
    assert all(row.ms_median and not row.missing for row in rows)
