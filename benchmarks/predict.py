"""python -m benchmarks predict: what the losses should take on a GPU, before anyone measured it.

Each case of the suite `heads` runs without data (counted.py) and is priced (prices.py). floor_ms is
that of a measured row: the products of the method at the GPU's rate, or its least bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

import fastdistill as fd

from .counted import Calls, on_gpu
from .data import Data
from .gpus import GPU, H200, HOST
from .ops import OPS, PREDICTED
from .prices import price
from .registry import Case, Contender, cases, outputs
from .shapes import SUITES, Shape, label

MODELLED = ("eager", "triton", "triton fused", "triton recompute")


@dataclass(frozen=True)
class Prediction:
    """One contender on one case; host_ms is the host's own time, parts are ms of the GPU."""

    op: str
    impl: str
    N: int
    H: int
    V: int
    K: int
    dtype: str
    gpu: str
    floor_ms: float
    predicted_ms: float
    gpu_ms: float
    host_ms: float
    launches: int
    gemms: int
    operators: int
    ratio: float
    bound: str
    parts: dict[str, float]

    @property
    def case(self) -> str:
        return f"{self.op}, {label(Shape(self.N, self.H, self.V, self.K))}, {self.dtype}"


def operands(shape: Shape, dtype: torch.dtype) -> Data:
    """Inputs of any op, without values."""
    N, H, V, K = shape.N, shape.H, shape.V, max(1, shape.K)

    def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")

    hidden, weight = (new(n, H, dtype=dtype).requires_grad_() for n in (N, V))
    teacher = fd.TopK(new(N, K, dtype=torch.int64), new(N, K), new(N))
    return Data(
        hidden,
        weight,
        new(N, dtype=torch.int64),
        teacher,
        new(N, H, dtype=dtype),
        new(V, H, dtype=dtype),
    )


def count(contender: Contender, case: Case, gpu: GPU = H200) -> Calls:
    """What one measured run of a contender would call."""
    with on_gpu(gpu) as calls:
        data = operands(case.shape, case.dtype)
        calls.clear()
        outputs(contender.compute, case.op.mode, data)
    return calls


def predict(contender: Contender, case: Case, gpu: GPU = H200) -> Prediction | None:
    """The predicted time of a contender on a case; None if it has no model."""
    if contender.impl not in MODELLED or case.dtype not in gpu.gemm:
        return None
    calls, s = count(contender, case, gpu), case.shape
    priced = price(gpu, HOST, calls)
    passes = case.op.passes if contender.passes is None else contender.passes
    flops = passes * s.N * s.V * s.H / gpu.gemm[case.dtype]
    longest_first = sorted(priced.parts, key=priced.parts.__getitem__, reverse=True)
    floor = max(flops, case.op.bytes(s, case.dtype.itemsize) / gpu.copy)
    return Prediction(
        op=case.name,
        impl=contender.impl,
        **asdict(s),
        dtype=str(case.dtype)[6:],
        gpu=gpu.name,
        floor_ms=floor * 1e3,
        predicted_ms=priced.total * 1e3,
        gpu_ms=priced.gpu * 1e3,
        host_ms=priced.host * 1e3,
        **calls.counts(),
        ratio=priced.total / floor,
        bound="host" if priced.host > priced.gpu else "GPU",
        parts={name: 1e3 * priced.parts[name] for name in longest_first},
    )


def predictions(gpu: GPU = H200) -> Iterator[Prediction]:
    """All modelled contenders of the suite `heads`, and of the ops that are only predicted."""
    known = cases(SUITES["heads"], OPS)
    more = [
        Case(name, op, c.shape, c.dtype)
        for name, (where, op) in PREDICTED.items()
        for c in known
        if c.name == where
    ]
    for case in dict.fromkeys([*known, *more]):
        for contender in case.op.contenders:
            prediction = predict(contender, case, gpu)
            if prediction is not None:
                yield prediction


def table(all_predictions: list[Prediction]) -> str:
    form = "{:12} {:17} {:>9} {:>9} {:>6} {:>8} {:>8} {:>9} {:>6} {:>9}  {}"
    heads = ("op", "impl", "floor ms", "predicted", "ratio", "GPU ms", "host ms")
    lines, last = [f"predicted for one {all_predictions[0].gpu}; nothing was measured"], None
    for p in all_predictions:
        if p.case != last:
            lines += ["", p.case, form.format(*heads, "launches", "GEMMs", "operators", "bound")]
            last = p.case
        figures = (p.floor_ms, p.predicted_ms, p.ratio, p.gpu_ms, p.host_ms)
        cells = [f"{figure:.2f}" for figure in figures]
        counts = (p.launches, p.gemms, p.operators)
        lines.append(form.format(p.op, p.impl, *cells, *counts, p.bound))
    return "\n".join(lines)


def report(as_json: bool) -> str:
    all_predictions = list(predictions())
    if as_json:
        return json.dumps([asdict(p) for p in all_predictions], indent=1, allow_nan=False)
    return table(all_predictions)
