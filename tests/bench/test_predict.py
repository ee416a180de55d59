"""`python -m benchmarks predict`: prices of counted calls, and what they may come to."""

import json
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from benchmarks import host_costs, rows
from benchmarks.__main__ import main
from benchmarks.counted import Calls, Gemm, Launch, Operator, Sizes, on_gpu
from benchmarks.gpus import H200, Host
from benchmarks.ops import OPS, PREDICTED
from benchmarks.predict import Prediction, count, predict, predictions
from benchmarks.prices import gemm_seconds, price
from benchmarks.registry import Case, Contender
from benchmarks.shapes import Shape
from helpers.present import present

MAIN, SMALL, SHORT = (
    Shape(8192, 4096, 128256, 64),
    Shape(2048, 1024, 151936, 64),
    Shape(512, 4096, 128256, 64),
)


def case_of(
    name: str, impl: str, shape: Shape, dtype: torch.dtype = torch.bfloat16
) -> tuple[Contender, Case]:
    case = Case(name, PREDICTED[name][1] if name in PREDICTED else OPS[name], shape, dtype)
    (contender,) = [c for c in case.op.contenders if c.impl == impl]
    return contender, case


def predicted(name: str, impl: str, shape: Shape) -> Prediction:
    return present(predict(*case_of(name, impl, shape)))


def test_operators_are_counted_with_the_bytes_that_they_move():
    with on_gpu(H200) as calls:
        x = torch.empty(100, 10, device="cuda")
        y = torch.zeros_like(x[:50])
        y.copy_(x[:50])
        torch.mul(x, 2.0, out=torch.empty_like(x, dtype=torch.bfloat16))
        y = torch.mm(x, x.t())
        x.gather(1, torch.empty(100, 1, dtype=torch.int64, device="cuda"))
    assert [e for e in calls if isinstance(e, Gemm)] == [
        Gemm(100, 100, 10, torch.float32, 8000, 40000)
    ]
    moved = {
        e.packet: (e.read, e.written) for e in calls if isinstance(e, Operator) if not e.is_free
    }
    assert moved == {
        "aten.zeros_like": (0, 2000),
        "aten.copy_": (2000, 2000),
        "aten.mul": (4000, 2000),
        "aten.gather": (800, 3200),
    }
    assert calls.counts() == {"gemms": 1, "launches": 0, "operators": 4}


@pytest.mark.parametrize(
    ("m", "n", "k", "share"),
    [(8192, 8192, 8192, 0.96), (2048, 128256, 4096, 0.99), (256, 4096, 128256, 0.93)],
)
def test_a_large_product_runs_near_the_peak(m, n, k, share):
    gemm = Gemm(m, n, k, torch.bfloat16, 2 * k * (m + n), 4 * m * n)
    assert share < 2 * m * n * k / 770e12 / gemm_seconds(H200, gemm) < 1


def test_a_kernel_starts_when_the_host_has_launched_it():
    """Ten launches of 100 µs on the host and 3 on the GPU, then a product that hides the host."""
    host = Host(launches={"triton_grad:grad_rows": 90e-6}, driver=10e-6, gemm=10e-6)
    small = Sizes((10,), torch.float32, 40)
    launches = Calls([Launch("triton_grad:grad_rows", (1,), {"p_raw": small})] * 10)
    slow = price(H200, host, launches)
    assert (slow.total, slow.gpu, slow.host) == pytest.approx((1003e-6, 30e-6, 1000e-6))
    gemm = Gemm(8192, 8192, 8192, torch.bfloat16, 1, 1)
    hidden = price(H200, host, Calls([gemm, *launches]))
    assert hidden.total == pytest.approx(10e-6 + gemm_seconds(H200, gemm) + 30e-6)


def test_every_launched_kernel_has_a_price_and_a_contender_may_have_no_model():
    op = OPS["topk_loss"]
    other = Contender("a peer", op.truth)
    assert predict(other, Case("topk_loss", op, Shape(8, 8, 99, 2), torch.bfloat16)) is None
    for name in ("renorm_both", "dense_jsd"):
        impl = "triton" if name == "renorm_both" else "triton fused"
        assert predicted(name, impl, Shape(256, 512, 9000, 8)).launches


class Bounds(NamedTuple):
    """What a call costs at most: GEMMs, launches of Triton kernels, operators that run a kernel.

    ratio is the predicted time as a multiple of the floor, wanted what it should come to.
    """

    gemms: int
    launches: int
    operators: int
    ratio: float
    wanted: float


BOUNDS = [
    ("topk_loss", "triton fused", MAIN, Bounds(12, 19, 42, 1.11, 1.2)),
    ("topk_loss", "triton fused", replace(MAIN, V=151936), Bounds(12, 19, 42, 1.1, 1.25)),
    ("topk_loss", "triton fused", SMALL, Bounds(6, 11, 34, 1.42, 1.5)),
    ("topk_loss", "triton fused", SHORT, Bounds(6, 11, 34, 1.31, 1.45)),
    ("topk_nla", "triton fused", MAIN, Bounds(12, 19, 42, 1.11, 1.2)),
    ("topk_lk_hybrid", "triton fused", MAIN, Bounds(12, 19, 42, 1.11, 1.2)),
    ("topk_loss", "triton recompute", MAIN, Bounds(317, 195, 23, 1.15, 1.25)),
    ("topk_loss", "triton recompute", SHORT, Bounds(32, 20, 23, 1.25, 1.25)),
    pytest.param(
        "topk_loss",
        "triton recompute",
        replace(MAIN, N=32768),
        Bounds(701, 579, 25, 1.13, 1.25),
        marks=pytest.mark.slow,
    ),
    ("scoring", "triton", MAIN, Bounds(128, 131, 15, 1.24, 1.3)),
    ("scoring", "triton", SMALL, Bounds(10, 13, 15, 1.76, 1.3)),
    ("scoring", "triton", SHORT, Bounds(8, 11, 15, 1.48, 1.3)),
    ("lse_gather", "triton", MAIN, Bounds(128, 128, 16, 1.22, 1.3)),
    ("linear_topk", "triton", MAIN, Bounds(10, 20, 31, 1.23, 1.45)),
    ("linear_topk", "triton", replace(MAIN, K=256), Bounds(11, 22, 34, 1.4, 1.6)),
    ("dense_loss", "triton fused", MAIN, Bounds(16, 18, 42, 1.17, 1.3)),
]


@pytest.mark.parametrize(("name", "impl", "shape", "bounds"), BOUNDS)
def test_a_public_call_costs_no_more_than_this(name, impl, shape, bounds):
    prediction = predicted(name, impl, shape)
    counts = {n: getattr(prediction, n) for n in ("gemms", "launches", "operators")}
    assert all(counts[n] <= getattr(bounds, n) for n in counts), counts
    assert prediction.ratio <= max(bounds.ratio, bounds.wanted), prediction


@pytest.mark.parametrize("name", ["topk_loss", "dense_loss"])
def test_operators_pass_over_a_float16_dw_when_it_is_complete(name):
    """Its scale is chosen and applied once, not per chunk."""
    calls = count(*case_of(name, "triton fused", MAIN, torch.float16))
    half_of_dw = MAIN.V * MAIN.H
    large = [
        e.packet
        for e in calls
        if isinstance(e, Operator) and not e.is_free and e.read + e.written > half_of_dw
    ]
    assert large == ["aten.linalg_vector_norm", "aten.mul"]


def host_is_bounded(p: Prediction) -> bool:
    """Whether the host's time of a call is at most 1.5 ms; docs/benchmarks/gpu.md has the reasons.

    Each chunk or slab costs launches, and memory bounds the tokens or columns of one.
    """
    if p.op in ("linear_topk", "renorm_both", "renorm_both_zipf"):
        return True
    if p.op in ("scoring", "lse_gather"):
        return p.N <= 2048
    return p.impl == "triton fused" and p.N <= 8192 and (p.H >= 4096 or p.op[:5] != "dense")


@pytest.mark.slow
def test_the_registry():
    """No loss or score is slower than eager PyTorch; where the host takes long is recorded here.

    Recomputation does 8NVH FLOPs where eager PyTorch does 6: it is not compared.
    """
    suite = list(predictions())
    eager = {p.case: p.predicted_ms for p in suite if p.impl == "eager"}
    ours = [p for p in suite if p.impl != "eager"]
    compared = [p for p in ours if p.impl != "triton recompute"]
    assert {p.case for p in compared if p.predicted_ms > eager.get(p.case, math.inf)} == set()
    assert {p.case for p in ours if p.bound == "host"} == set()
    busy = {p.case for p in ours if p.host_ms > p.gpu_ms / 2}
    assert busy <= {
        "scoring, llama-3.1-8b N=512 K=64, bfloat16",
        "topk_loss, qwen3-0.6b N=512 K=64, bfloat16",
        "lse_gather, llama-3.1-8b N=512 K=64, bfloat16",
    }
    assert {p.case for p in ours if host_is_bounded(p) and p.host_ms > 1.5} == set()


def test_eager_pytorch_passes_over_its_logits():
    eager = predicted("topk_loss", "eager", MAIN)
    assert 40 < eager.predicted_ms < 50
    assert eager.gemms == 3


def test_the_command_prints_the_suite(monkeypatch, capsys):
    some = predicted("topk_loss", "eager", Shape(64, 64, 999, 8))
    monkeypatch.setattr("benchmarks.predict.predictions", lambda: iter([some]))
    assert main(["predict"]) == 0
    text = capsys.readouterr().out
    assert "nothing was measured" in text
    assert main(["predict", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert {"floor_ms", "predicted_ms", "host_ms", "launches", "bound"} < set(record)


def test_a_measured_row_shows_its_prediction_where_there_is_one(tmp_path):
    row = rows.Row.at(Shape(8, 32, 500, 1), "topk_loss", "eager", "both")
    row.ms_median = 2.0
    assert "predicted" not in rows.table([row])
    assert "predicted_ms" not in rows.records([row])[0]
    row.predicted_ms, row.predicted_host_ms = 1.25, 0.5
    assert "1.25" in rows.table([row])
    (path, _) = rows.write([row], tmp_path / "some")
    (record,) = json.loads(path.read_text(encoding="utf-8"))
    assert (record["predicted_ms"], record["predicted_host_ms"]) == (1.25, 0.5)


def test_the_costs_of_the_host_can_be_measured_again(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(host_costs, "REPEATS", 1)
    monkeypatch.setattr(host_costs, "CALLS", 1)
    host_costs.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.endswith(" µs") for line in lines)
