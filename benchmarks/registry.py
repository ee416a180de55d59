"""Ops, contenders, cases, and the gate that rejects wrong results.

An op defines a computation, its contenders implement it, and a case is an op on one shape in one
dtype. Before timing, each contender is compared with the fp64 reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Data
from .packages import installed
from .shapes import DTYPES, FIXED_K, GATE, QUICK, Entry, Shape

Outputs = Mapping[str, Tensor]
Compute = Callable[[Data], Any]  # a scalar loss, or in forward mode the outputs by name
INDICES = ("ids", "argmax")
# ‖g − g₆₄‖ / ‖g₆₄‖. fp32 with tf32 products is near 3e-4 and rejected.
BUDGET = {torch.bfloat16: 3e-3, torch.float16: 3e-3, torch.float32: 1e-4, torch.float64: 1e-9}
# Near convergence a loss is the difference of nearly equal sums, with fewer exact digits than its
# gradient.
LOSS_BUDGET = 3e-3
# A peer with rounded logits above this computes another function.
HOPELESS = 0.5


class Missing(Exception):
    """Raised by a contender that cannot run here; its message becomes the row's reason."""


class BrokenPeer(RuntimeError):
    """An installed peer cannot be imported or called.

    Its row reports it; a test fails if the version is the pinned one.
    """


class GateError(RuntimeError):
    """A contender's result is wrong; no figure of the case is reported."""


class DeviceLost(RuntimeError):
    """The GPU does not respond after an error; only a new process can continue."""


@dataclass(frozen=True)
class Contender:
    """An implementation of an op.

    passes: FLOPs of its method in units of N·V·H, if they differ from the op's.
    rate: "int8" or "fp8" if its products are compared with that peak instead of the dtype's.
    package: the distribution of a peer; empty for ours and for plain PyTorch functions.
    """

    impl: str
    compute: Compute
    exact: bool = True  # must meet the budget; a peer that rounds logits is reported, not gated
    passes: float | None = None
    compiles: bool = False  # for every shape, which takes longer than measuring
    prepares: bool = False  # its first call prepares later ones, as loading a model does
    part: bool = False  # computes a part of the op: its time is a lower bound, and it has no error
    rate: str = ""
    package: str = ""


@dataclass(frozen=True)
class Op:
    about: str
    mode: str  # "forward" | "both"
    make: Callable[[Shape, torch.dtype], Data]
    truth: Compute  # called with fp64 data
    contenders: tuple[Contender, ...]
    passes: float  # FLOPs in units of N·V·H
    bytes: Callable[[Shape, int], float]  # minimum memory traffic of any method


@dataclass(frozen=True)
class Case:
    name: str
    op: Op
    shape: Shape
    dtype: torch.dtype
    compiled: bool = True

    @property
    def gate_shape(self) -> Shape:
        return replace(GATE, K=self.shape.K)

    def __str__(self) -> str:
        s = self.shape
        return f"{self.name} N={s.N} H={s.H} V={s.V} K={s.K} {str(self.dtype)[6:]}"


def allowed(name: str, dtype: torch.dtype) -> float:
    return LOSS_BUDGET if name == "loss" else BUDGET[dtype]


class GateResult(NamedTuple):
    """errors of the contenders to be timed (None: a part); failures: why others are not timed."""

    errors: dict[str, float | None]
    failures: dict[str, str]


def cases(entries: Iterable[Entry], ops: Mapping[str, Op], quick: bool = False) -> list[Case]:
    """The cases behind entries of a suite; `quick` replaces their shapes and compiles nothing."""
    result = []
    for entry in entries:
        small = replace(QUICK, K=FIXED_K.get(entry.op, QUICK.K))
        shape = small if quick else entry.shape
        dtype = getattr(torch, DTYPES[entry.dtype])
        result.append(Case(entry.op, ops[entry.op], shape, dtype, entry.compiled and not quick))
    return result


def run(contender: Contender, case: Case, data: Data) -> Outputs:
    """One computation: the outputs, or in mode "both" the loss and its two gradients."""
    if contender.compiles and not case.compiled:
        raise Missing("left out here: compiling for one shape takes longer than measuring it")
    try:
        return outputs(contender.compute, case.op.mode, data)
    except (Missing, BrokenPeer, torch.OutOfMemoryError):
        raise
    except Exception as error:
        installed_version = installed(contender.package)
        if installed_version is None:
            raise
        raise BrokenPeer(
            f"{contender.package} {installed_version} is installed and cannot be called: "
            f"{type(error).__name__}: {error}"
        ) from error


def outputs(compute: Compute, mode: str, data: Data) -> Outputs:
    if mode == "forward":
        with torch.no_grad():
            results = compute(data)
        return {name: t for name, t in results.items() if t is not None}
    loss = compute(data)
    hidden, weight = torch.autograd.grad(loss, (data.hidden, data.weight))
    return {"loss": loss.detach(), "hidden": hidden, "weight": weight}


def relative(result: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    error = (result.detach().double() - truth).norm() / truth.norm().clamp(min=1e-300)
    return error.item()


def misplaced(result: Tensor, truth: Tensor) -> float:
    """Share of indices that are not among the true ones of their row."""
    rows = (t.reshape(truth.shape[0], -1) for t in (result, truth))
    a, b = rows
    return 1 - (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).double().mean().item()


def deviations(results: Outputs, truth: Outputs) -> dict[str, float]:
    """Per output: ‖f − f₆₄‖ / ‖f₆₄‖, or the share of wrong indices."""
    return {
        name: (misplaced if name in INDICES else relative)(results[name], truth[name])
        for name in truth
    }


def worst(errors: Mapping[str, float]) -> float:
    """The largest error; NaN if any is NaN."""
    values = list(errors.values())
    return float("nan") if any(v != v for v in values) else max(values)


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (the result of `work`, None), or (None, the reason why it failed)."""
    memory = False
    try:
        return work(), None
    except Missing as error:
        return None, str(error)
    except torch.OutOfMemoryError as error:
        memory = True
        reason = "out of memory: " + str(error).partition(". GPU")[0]
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"[:300]
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"{reason}; the GPU answers nothing since") from error
        if memory:
            torch.cuda.empty_cache()
    return None, reason


def _deviations(contender: Contender, case: Case, data: Data, truth: Outputs) -> dict[str, float]:
    results = run(contender, case, data)
    return {} if contender.part else deviations(results, truth)


def gate(case: Case) -> GateResult:
    """Compare all contenders with fp64 on the gate's shape; raise if an exact one is wrong."""
    data = case.op.make(case.gate_shape, case.dtype)
    truth = outputs(case.op.truth, case.op.mode, data.wide())
    checked = GateResult({}, {})
    for contender in case.op.contenders:
        # Compared inside the attempt: an error of a GPU kernel is raised at synchronization.
        errors, reason = attempt(functools.partial(_deviations, contender, case, data, truth))
        if reason is not None:
            checked.failures[contender.impl] = reason
            continue
        if contender.part:
            checked.errors[contender.impl] = None
            continue
        for name, error in errors.items():
            budget = allowed(name, case.dtype)
            if contender.exact and not error <= budget:
                raise GateError(
                    f"{case} {contender.impl}: error {error:.3g} of {name} against fp64 on "
                    f"{case.gate_shape} exceeds {budget:.3g}; nothing of this case is reported"
                )
        error = worst(errors)
        if not error <= HOPELESS:
            checked.failures[contender.impl] = f"error {error:.3g} against fp64: another function"
            continue
        errors.pop("loss", None)
        checked.errors[contender.impl] = worst(errors)
    return checked
