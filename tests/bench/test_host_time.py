"""The benchmark of the host's time, without a GPU: its rows, and what they say."""

from __future__ import annotations

import torch

from benchmarks import host_time
from benchmarks.shapes import GATE


def test_without_a_gpu_every_row_is_missing():
    reasons = {row.impl: row.reason for row in host_time.rows(GATE)}
    assert reasons == dict.fromkeys(
        ["triton fused", "triton fused, replayed", "triton", "triton, replayed"],
        "the time of the host needs a CUDA device",
    )


def test_rows_have_the_time_of_both_and_of_the_host(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(host_time, "_call", lambda op, shape: lambda: torch.ones(9).exp())
    monkeypatch.setattr(host_time, "_replay", lambda call: call)
    rows = host_time.rows()
    assert len(rows) == 2 * 2 * len(host_time.SIZES)
    assert all(row.ms_median is not None and not row.missing for row in rows)
    assert [row.note is not None for row in rows] == [True, False] * (len(rows) // 2)
    assert (rows[0].note or "").startswith("host 0.")
    assert capsys.readouterr().err.count("aten::exp") == len(host_time.CALLS)

    def fails(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(host_time, "_replay", fails)
    plain, replayed = host_time.rows()[:2]
    assert plain.ms_median is not None
    assert (replayed.reason or "").startswith("RuntimeError: operation not permitted")
