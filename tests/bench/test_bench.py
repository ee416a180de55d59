"""The benchmarks report nothing wrong, and what is missing as missing."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import data, peers, plot, quantized, rows
from benchmarks.ops import OPS
from benchmarks.registry import Case, Contender, GateError, Missing, Op, cases, gate
from benchmarks.roofline import Rates
from benchmarks.run import WallClock, fill_roofline, measure, measure_all
from benchmarks.shapes import FIXED_K, HEADS, QUICK, SUITES, Shape, entry
from helpers.command import call
from helpers.present import present

ROOT = Path(__file__).resolve().parents[2]
RATES = Rates({torch.float32: 1e12, torch.bfloat16: 2e12}, 1e10)
RIGHT, LOSSES = Contender("right", peers.label_loss), sorted(set(OPS) - set(quantized.OPS))
SCHEMA = """op impl mode N H V K dtype ms_median ms_p20 ms_p80 peak_mb grad_error roofline_share
    machine versions commit command""".split()
FIGURES = "ms_median ms_p20 ms_p80 peak_mb output_mb grad_error roofline_share floor_ms".split()


def label_case(*contenders: Contender) -> Case:
    op = Op("", "both", data.labeled, peers.label_loss, contenders, 6, lambda s, size: 1e6)
    return Case("label_loss", op, Shape(8, 32, 500, 1), torch.float32)


def measured(*contenders: Contender, repeats: int = 1) -> list[rows.Row]:
    return measure(label_case(*contenders), repeats, RATES, WallClock(), lambda line: None)


def everything(cases: list[Case], **options):
    options |= {"rates": RATES, "timer": WallClock(), "say": lambda line: None}
    return measure_all(cases, 1, **options)


def scaled(factor: float, only_at: int | None = None):
    """The right loss times a factor, perhaps at one number of tokens only."""

    def compute(d: data.Data):
        here = only_at is None or d.hidden.shape[0] == only_at
        return peers.label_loss(d) * (factor if here else 1.0)

    return compute


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("factor", [1.001, 1.1, float("nan")])
def test_the_gate_refuses_a_wrong_contender(factor):
    wrong = Contender("wrong", scaled(factor))
    with pytest.raises(GateError, match=r"label_loss N=8 .* wrong: error .* exceeds 0.0"):
        gate(label_case(RIGHT, wrong))
    result = everything([label_case(RIGHT, wrong)], deadline=1e9, save=list, now=lambda: 0)
    assert (result.rows, len(result.refused)) == ([], 1)


def test_what_is_wrong_at_full_size_only_is_refused_too():
    with pytest.raises(GateError, match=r"the norm of loss is .* with wrong and .* with right"):
        measured(RIGHT, Contender("wrong", scaled(1.01, only_at=8)))


def test_a_peer_is_shown_with_its_error_unless_it_computes_something_else():
    coarse, other, part = measured(
        Contender("coarse", scaled(1.01), exact=False),
        Contender("other", scaled(3), exact=False),
        Contender("part", scaled(3), exact=False, part=True),
    )
    assert coarse.grad_error == pytest.approx(0.01, rel=1e-3)
    assert not coarse.missing
    assert other.missing
    assert "another function" in (other.reason or "")
    assert part.ms_median is not None
    assert part.grad_error is None


def not_installed(d: data.Data):
    return peers.named("no-such-peer", "no_such_peer", "loss")(d)


def wrong_signature(d: data.Data):
    return (lambda: None)(d.hidden)  # type: ignore[call-arg]


def out_of_memory(d: data.Data):
    if d.hidden.shape[0] == 8:  # the full size; the gate's is larger here
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB. GPU 0 has …")
    return peers.label_loss(d)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (not_installed, "no-such-peer: No module named 'no_such_peer'"),
        (wrong_signature, "TypeError: .*positional argument"),
        (out_of_memory, "out of memory: CUDA out of memory. Tried to allocate 34 GiB$"),
    ],
)
def test_who_cannot_run_is_a_row_that_says_why_and_carries_no_figure(compute, reason):
    right, gone = measured(RIGHT, Contender("gone", compute))
    assert gone.missing
    assert re.match(reason, gone.reason or "")
    assert [getattr(gone, name) for name in FIGURES] == [None] * len(FIGURES)
    assert None not in [getattr(right, name) for name in FIGURES]


@pytest.mark.parametrize("name", LOSSES)
def test_every_op_passes_its_gate(name):
    (case,) = cases([entry(name, "qwen3-0.6b", 512, 16, "bf16")], OPS, quick=True)
    checked = gate(case)
    assert any(impl.startswith("torch") for impl in checked.errors)
    assert "eager" in checked.errors
    if not torch.cuda.is_available():
        assert any(impl.startswith("triton") for impl in checked.failures)


def test_roofline_share_is_the_floor_at_measured_rates_over_the_time():
    case = label_case(RIGHT, Contender("again", peers.label_loss, passes=8))
    row, again = (rows.Row("label_loss", "", "both", 8, 32, 500, 1, "float32") for _ in "ab")
    row.ms_median = again.ms_median = 1.0
    fill_roofline(row, case, case.op.contenders[0], RATES)
    assert row.floor_ms == row.roofline_share == pytest.approx(1e6 / 1e10 * 1e3)
    slow_gemm = Rates({torch.float32: 1e9}, 1e10)
    fill_roofline(row, case, case.op.contenders[0], slow_gemm)
    fill_roofline(again, case, case.op.contenders[1], slow_gemm)
    assert row.roofline_share == pytest.approx(6 * 8 * 500 * 32 / 1e9 * 1e3)
    assert again.roofline_share == pytest.approx(8 / 6 * present(row.roofline_share))
    assert (row.gemm_tflops, row.copy_gb_s) == (1e-3, 10)


def test_no_case_starts_after_the_deadline_and_rows_are_saved_after_each():
    clock, saved = itertools.count(), []
    options = {"save": lambda r: saved.append(len(r)), "now": lambda: next(clock)}
    result = everything([label_case(RIGHT)] * 4, deadline=2, **options)
    assert len(result.rows) == 2
    assert saved == [1, 2]
    assert result.not_run == ["label_loss N=8 H=32 V=500 K=1 float32"] * 2


def test_csv_says_what_json_says(tmp_path):
    results = measured(RIGHT, Contender("gone, or “gone”", not_installed), repeats=3)
    rows.write(results, tmp_path / "some")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.csv", "some.json"]
    records = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))
    assert records == rows.records(results)
    assert set(SCHEMA) < set(records[0])
    table = list(csv.DictReader((tmp_path / "some.csv").read_text("utf-8").splitlines()))
    names = [f.name for f in fields(rows.Row) if f.name not in rows.PREDICTIONS]
    assert [list(line) for line in table] == [names] * 2
    assert table == [{name: rows.cell(r[name]) for name in names} for r in records]


@pytest.mark.parametrize(
    "path",
    sorted(p for p in rows.RESULTS.glob("*.json") if p.name != "real_model.json"),  # a study
    ids=lambda p: p.name,
)
def test_results_on_record_have_the_schema(path):
    for record in json.loads(path.read_text(encoding="utf-8")):
        assert set(SCHEMA) <= set(record)
        assert re.search(r", \d+ threads, \w+$", record["machine"])  # instruction set last
        if record.get("missing"):
            assert record["ms_median"] is record["grad_error"] is None


def test_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    table = measured(RIGHT, Contender("gone", not_installed))
    assert plot.png(table, tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["some.png"]
    with pytest.raises(Missing, match="no row carries a time"):
        plot.png(table[1:], tmp_path / "none.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Missing, match="pip install matplotlib"):
        plot.png(table, tmp_path / "none.png")


def test_suites_cover_the_heads_and_the_ranges_of_n_and_k():
    heads = SUITES["heads"]
    assert {(e.shape.H, e.shape.V) for e in heads} == set(HEADS.values())
    assert {e.op for e in heads} == set(LOSSES)
    assert set(FIXED_K) < set(OPS)
    assert {512, 32768} <= {e.shape.N for e in heads}
    assert {1, 256} <= {e.shape.K for e in heads if e.op == "topk_loss"}
    assert len(cases(SUITES["sparse_loss"], OPS)) == 4


def bench(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = before + "from fastdistill.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_list_is_one_json_document():
    process = bench("--list", "--json")
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    assert set(document["ops"]) == set(OPS)
    assert "TRL chunked" in document["ops"]["dense_jsd"]["implementations"]


def test_the_verb_measures_and_writes(tmp_path):
    process = bench("renorm_both", "--quick", "--repeats", "1", "--json", "--out", str(tmp_path))
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout)
    stem = "renorm_both" + "_cuda" * torch.cuda.is_available()
    assert document["rows"] == json.loads((tmp_path / f"{stem}.json").read_text(encoding="utf-8"))
    by_impl = {row["impl"]: row for row in document["rows"]}
    assert by_impl["torch"]["roofline_share"] > 0
    assert by_impl["torch"]["N"] == QUICK.N
    assert by_impl["torch"]["command"].startswith("fastdistill bench renorm_both --quick")
    assert by_impl["compiled"]["missing"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "unknown benchmark 'nothing'"),
        (("heads", "--k", "8"), "heads has shapes of its own"),
        (("label_loss", "--k", "8"), "whose K is 1"),
        (("renorm_both", "--k", "1"), "--k 2 or more"),
        (("--shape", "gpt-2"), "qwen3-0.6b"),
    ],
)
def test_a_request_that_is_wrong_is_exit_2(capsys, monkeypatch, arguments, words):
    code, _, error = call(capsys, monkeypatch, "bench", *arguments)
    assert code == 2
    assert words in error
    assert "Traceback" not in error


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path):
    (tmp_path / "fastdistill").mkdir()
    shutil.copy(ROOT / "fastdistill" / "__init__.py", tmp_path / "fastdistill")
    shutil.copytree(ROOT / "fastdistill" / "cli", tmp_path / "fastdistill" / "cli")
    elsewhere = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    process = bench("--list", before=elsewhere)
    assert process.returncode == 2
    assert "run it from a checkout" in process.stderr
    assert process.stdout == ""
