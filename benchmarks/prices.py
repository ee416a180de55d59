"""The time of counted events on a GPU and its host, from rates and bytes.

product      waves of 128 × 256 tiles, or its bytes, + the stores of the last wave + a start
kernel       its bytes from HBM, or from L2 if what ran before fits there; never below a minimum
host         calls × their cost; a kernel starts when the host has launched it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .counted import Calls, Event, Gemm, Launch, Operator, Sizes
from .gpus import GPU, Host

TILE = (128, 256)
SPLITS = (1, 2, 4, 8, 16)  # of the inner dimension: cuBLAS splits it if the tiles fill no wave

# How many kernels an operator runs, if not one, from PyTorch's CUDA sources.
KERNELS_OF = {
    "aten.logsumexp": 9,  # amax, abs, eq, masked_fill, sub, exp, sum, log, add
    "aten.masked_fill": 2,  # a copy first, as all functional forms of in-place operators
    "aten.scatter": 2,
    "aten.scatter_add": 2,
    "aten.scatter_reduce": 2,
    "aten.where.ScalarSelf": 2,  # the number becomes a tensor
    "aten.where.ScalarOther": 2,
    "aten.sort": 4,
    "aten.topk": 2,
    "aten.gather_backward": 2,
    "aten.nll_loss_backward": 2,
}
# How often an operator reads its operands and writes its result, if not once each. SoftMax.cu reads
# a long row three times forward; backward it reads the gradient twice and the output once.
PASSES_OF = {
    "aten._log_softmax": 2.0,  # 3 reads + 1 write, counted as 1 + 1
    "aten._softmax": 2.0,
    "aten._log_softmax_backward_data": 4 / 3,  # 3 reads + 1 write, counted as 2 + 1
    "aten.logsumexp": 6.0,
    "aten.masked_fill": 2.0,
    "aten.scatter": 2.0,
}
# torch.topk of 2048 rows of 131072 fp32 took 3.01 ms (FlashInfer, pull request 3009).
TOPK_RATE = 2048 * 131072 * 4 / 3.01e-3
# Instructions of the loop of reduce_rows per logit, from its machine code for sm_90: with the two
# largest logits and moments, otherwise, and for a second temperature.
REDUCE_INSTRUCTIONS = {True: 29, False: 19}
REDUCE_BASE = 11
GROUP_INSTRUCTIONS = 29  # of reduce_groups per logit
# Of the dense kernels per pair of logits: with forward KL, and with JSD, the longest.
DENSE_INSTRUCTIONS = {
    "triton_dense:sum_divergence": (22, 64),
    "triton_dense:grad_divergence": (26, 57),
}
ENTRY = 0.375e-6  # sum_runs: one entry of a run, whose loads depend on one another
LONGEST_RUN = 0.3  # share of the tokens whose answers contain the most frequent id

Price = Callable[[GPU, "Launch", float], float]


def _streamed(gpu: GPU, launch: Launch, rate: float) -> float:
    """Each tensor argument is read or written once."""
    return _moved(launch) / rate


def _reduced(gpu: GPU, launch: Launch, rate: float) -> float:
    a = launch.arguments
    each = REDUCE_INSTRUCTIONS[a["BEST"]] + REDUCE_BASE * a["BASE"]
    return max(_moved(launch) / rate, math.prod(a["p_raw"].shape) * each / gpu.instructions)


def _grouped(gpu: GPU, launch: Launch, rate: float) -> float:
    logits = math.prod(launch.arguments["p_raw"].shape)
    return max(_moved(launch) / rate, logits * GROUP_INSTRUCTIONS / gpu.instructions)


def _dense(gpu: GPU, launch: Launch, rate: float) -> float:
    is_short = str(launch.arguments["PHI"]).endswith("forward_kl")
    each = DENSE_INSTRUCTIONS[launch.kernel][not is_short]
    pairs = math.prod(launch.arguments["p_raw"].shape)
    return max(_moved(launch) / rate, pairs * each / gpu.instructions)


def _rows(gpu: GPU, launch: Launch, rate: float) -> float:
    """A row of W, or of the hidden states, for each slot; other tensors once."""
    a = launch.arguments
    row = a["H"] * (a.get("p_w") or a["p_x"]).dtype.itemsize
    others = sum(size for name, size in _sizes(a) if name not in ("p_w", "p_dw", "p_db"))
    return (math.prod(a["p_ids"].shape) * row + others) / gpu.copy


def _runs(gpu: GPU, launch: Launch, rate: float) -> float:
    """As `_rows`, and the rows of dW whose ids occur; at least the longest run up to a cut."""
    a = launch.arguments
    moved = _rows(gpu, launch, rate)
    if a["p_dw"] is not None:
        ids = min(a["E"], a["p_dw"].shape[0])
        moved += ids * a["H"] * a["p_dw"].dtype.itemsize / gpu.copy
    return max(moved, min(LONGEST_RUN * a["p_x"].shape[0], a["BC"]) * ENTRY)


def _parts(gpu: GPU, launch: Launch, rate: float) -> float:
    """One part of a run; `_runs` has the bytes of all."""
    a = launch.arguments
    return min(LONGEST_RUN * a["p_x"].shape[0], a["BC"]) * ENTRY


def _compared(gpu: GPU, launch: Launch, rate: float) -> float:
    """Three instructions for each pair of slots of a token: compare, select, add."""
    a = launch.arguments
    return max(_moved(launch) / rate, 3 * a["n"] * a["S"] ** 2 / gpu.instructions)


def _nothing(gpu: GPU, launch: Launch, rate: float) -> float:
    """A benchmark's upstream scalar is 1: the kernel returns without reading the gradient."""
    return 0.0


PRICES: dict[str, Price] = {
    "triton_reduce:reduce_rows": _reduced,
    "triton_topk:reduce_groups": _grouped,
    "triton_topk:finish_topk": _streamed,
    "triton_token_loss:token_loss": _streamed,
    "triton_token_loss:merge_slots": _compared,
    "triton_token_scores:token_scores": _streamed,
    "triton_grad:grad_rows": _streamed,
    "triton_grad:scale_in_place": _nothing,
    "triton_dense:sum_divergence": _dense,
    "triton_dense:grad_divergence": _dense,
    "triton_gather:gather_rows": _rows,
    "triton_gather:scatter_hidden": _rows,
    "triton_gather:sum_parts": _parts,
    "triton_gather:sum_runs": _runs,
}


def _moved(event: Event) -> int:
    if not isinstance(event, Launch):
        return event.read + event.written
    return sum(size for _, size in _sizes(event.arguments))


def _sizes(arguments: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The tensors among the arguments of a kernel, and their bytes."""
    for name, value in arguments.items():
        if isinstance(value, Sizes):
            yield name, value.bytes


def gemm_seconds(gpu: GPU, gemm: Gemm) -> float:
    rate = gpu.gemm[gemm.operand]
    store = gemm.written / (gemm.m * gemm.n)

    def computing(a: int, b: int, parts: int) -> float:
        tiles = -(-gemm.m // a) * -(-gemm.n // b) * parts
        waves = -(-tiles // gpu.sms)
        seconds = waves * gpu.sms * 2 * a * b * -(-gemm.k // parts) / rate
        if parts > 1:  # fp32 parts, written and read again
            seconds += 2 * parts * gemm.m * gemm.n * 4 / gpu.l2
        return seconds + min(tiles, gpu.sms) * a * b * store / gpu.l2

    best = min(computing(*tile, parts) for tile in (TILE, TILE[::-1]) for parts in SPLITS)
    return max(best, (gemm.read + gemm.written) / gpu.copy) + gpu.gemm_start


def gpu_seconds(gpu: GPU, event: Event, before: Event | None) -> float:
    """The time of an event on the GPU, 0 without a kernel."""
    if isinstance(event, Gemm):
        return gemm_seconds(gpu, event)
    stays = before is not None and max(_moved(before), _moved(event)) <= gpu.l2_bytes
    rate = gpu.l2 if stays else gpu.copy
    if isinstance(event, Launch):
        if event.kernel not in PRICES:
            raise KeyError(f"no price of {event.kernel}; add one to PRICES in {__file__}")
        moving = PRICES[event.kernel](gpu, event, rate)
        return gpu.gap + max(gpu.shortest, moving)
    if event.is_free:
        return 0.0
    kernels = kernels_of(event)
    moving = _moved(event) * PASSES_OF.get(event.packet, 1.0) / rate
    if event.packet == "aten.topk":
        moving = event.read / TOPK_RATE
    return kernels * gpu.gap + max(kernels * gpu.shortest, moving)


def kernels_of(operator: Operator) -> int:
    return KERNELS_OF.get(operator.name, KERNELS_OF.get(operator.packet, 1))


def host_seconds(host: Host, event: Event) -> float:
    if isinstance(event, Launch):
        return host.driver + host.launches.get(event.kernel, host.launch)
    if isinstance(event, Gemm):
        return host.gemm
    return host.view if event.is_free else host.operator * kernels_of(event)


def name_of(event: Event) -> str:
    if isinstance(event, Gemm):
        return "gemm"
    return event.kernel if isinstance(event, Launch) else event.packet


class Priced(NamedTuple):
    """Seconds: until the last kernel has run, of all kernels, and of the host; kernels by name."""

    total: float
    gpu: float
    host: float
    parts: dict[str, float]


def price(gpu: GPU, host: Host, calls: Calls) -> Priced:
    """Two timelines: the host issues events one after the other, the GPU runs them in order."""
    issued = done = busy = 0.0
    parts: dict[str, float] = {}
    before: Event | None = None
    for event in calls:
        issued += host_seconds(host, event)
        seconds = gpu_seconds(gpu, event, before)
        if not seconds:
            continue
        done, busy, before = max(done, issued) + seconds, busy + seconds, event
        name = name_of(event)
        parts[name] = parts.get(name, 0.0) + seconds
    return Priced(max(done, issued), busy, issued, parts)
