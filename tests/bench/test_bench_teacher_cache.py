"""The benchmark of the cache compares the same answers, and refuses to report others."""

from __future__ import annotations

import pytest

from benchmarks import teacher_cache
from benchmarks.registry import GateError
from benchmarks.shapes import Shape
from fastdistill import TopK
from helpers.pinned import is_as_pinned
from helpers.present import present

SMALL = Shape(N=1024, H=32, V=300, K=8)


def test_rows_have_times_of_the_same_answers():
    by_name = {(row.op, row.impl): row for row in teacher_cache.rows(SMALL)}
    assert len(by_name) == 6
    for (_, name), row in by_name.items():
        if row.missing:
            assert name == "Parquet, two workers"
            assert not is_as_pinned("pyarrow"), row.reason
            continue
        assert present(row.ms_median) > 0
    for key in (("cache_build", "TeacherCache.build"), ("cache_read", "one process")):
        assert present(by_name[key].grad_error) < teacher_cache.MOST_ERROR
        per_token = present(by_name[key].output_mb) * 1e6 / by_name[key].N
        assert per_token == pytest.approx(8 * 4 + 1 + 8, rel=0.5)
    assert "million tokens/s" in teacher_cache.table(list(by_name.values()))


@pytest.mark.parametrize("lie", ["ids", "logprobs"])
def test_other_answers_are_refused(monkeypatch, lie):
    class Wrong(teacher_cache._Peaked):
        calls = 0

        def topk(self, *args, **kwargs):
            answers = super().topk(*args, **kwargs)
            Wrong.calls += 1
            if Wrong.calls == 1:
                return answers
            other = {"ids": answers.ids + 1, "logprobs": answers.logprobs - 0.1}
            return TopK(**answers._asdict() | {lie: other[lie]})

    monkeypatch.setattr(teacher_cache, "_Peaked", Wrong)
    with pytest.raises(GateError, match="nothing is reported"):
        teacher_cache.rows(SMALL)
