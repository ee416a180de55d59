"""Quantized inference: 4-bit dequantization, linear layers, the teacher's top-k.

In a linear op N is tokens, and H and V are columns and rows of a weight [V, H]. The reference is
the fp64 product with the dequantized weights. A contender that also rounds activations, or weights
in another way, is reported with its error and not gated. Layers are built once, before timing; for
few tokens several copies take turns, so that no cache holds the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastdistill.kernels.row_topk import by_sorting, row_topk
from fastdistill.losses import cpu_kernels
from fastdistill.quant import Int8Linear, LUT4Linear
from fastdistill.quant.backends.table import engine_for
from fastdistill.quant.linear import dequantize
from fastdistill.quant.schemes import quantize
from fastdistill.runtime import backend

from . import quant_peers
from .data import Data, device
from .registry import Contender, Missing, Op
from .shapes import Shape

cpu_kernels.register()

BITSANDBYTES = "bitsandbytes"
COLD_BYTES = 96 << 20  # of 4-bit weights: more than the last-level cache of a CPU
FEW_TOKENS = 16

_prepared = WeakTensorKeyDictionary()


def plain(shape: Shape, dtype: torch.dtype) -> Data:
    """Activations of unit variance, and weights of the scale of a trained layer."""
    at = device()
    g = torch.Generator(at).manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=g, device=at).to(dtype)
    weight = torch.randn(shape.V, shape.H, generator=g, device=at).mul_(0.02).to(dtype)
    return Data(hidden, weight, hidden.new_zeros(0, dtype=torch.int64))


def rows_of_logits(shape: Shape, dtype: torch.dtype) -> Data:
    """[N, V] logits of standard deviation 4, stored as the weight."""
    at = device()
    g = torch.Generator(at).manual_seed(0)
    z = torch.randn(shape.N, shape.V, generator=g, device=at).mul_(4).to(dtype)
    return Data(z, z, torch.tensor([shape.K]))


def layer(make: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Callable[[Data], Any]:
    """A contender that multiplies by each layer built from the weight of the case once."""

    def run(data: Data) -> dict[str, Tensor]:
        return {"out": next(_layers(data, make))(data.hidden)}

    return run


def _layers(data: Data, make: Callable[[Tensor], Any]) -> Iterator[Any]:
    """For few tokens, enough copies that each is cold again at its next turn."""
    cache = _prepared.setdefault(data.weight, {})
    if make not in cache:
        copies = 1
        if data.hidden.shape[0] <= FEW_TOKENS:
            copies = math.ceil(COLD_BYTES / (data.weight.numel() / 2))
        cache[make] = itertools.cycle([make(data.weight) for _ in range(copies)])
    return cache[make]


def _empty_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def ours(kind: str, compute: str) -> Contender:
    def make(weight: Tensor) -> nn.Module:
        if compute == "fp8" and not weight.is_cuda:
            raise Missing("fp8 products need a GPU of sm_89 or later")
        if backend.extension() is None and not weight.is_cuda:
            raise Missing("the C++ extension was not built")
        linear = _empty_linear(weight)
        if kind == "int8":
            return Int8Linear.from_linear(linear, compute=compute)
        return LUT4Linear.from_linear(linear, kind, compute=compute)

    rate = {"exact": "", "int8": "int8", "fp8": "fp8"}[compute]
    return Contender(compute, layer(make), exact=compute == "exact", prepares=True, rate=rate)


def peer(impl: str, make: Callable[[Tensor], Any], package: str = "") -> Contender:
    return Contender(impl, layer(make), exact=False, prepares=True, package=package)


def product(scheme: str) -> Callable[[Data], Any]:
    def truth(data: Data) -> dict[str, Tensor]:
        meant = dequantize(quantize(data.weight, scheme)).double()
        return {"out": data.hidden.double() @ meant.t()}

    return truth


def expanded(data: Data) -> dict[str, Tensor]:
    return {"weight": dequantize(quantize(data.weight, "nf4"))}


def _into_scratch(weight: Tensor) -> Callable[[Tensor], Tensor]:
    quantized, out, engine = (
        quantize(weight, "nf4"),
        torch.empty_like(weight),
        engine_for(weight.device),
    )

    def run(x: Tensor) -> Tensor:
        engine.lut4_dequant(quantized, out)
        return out

    return run


def _weight(make: Callable[[Tensor], Any]) -> Callable[[Data], Any]:
    run = layer(make)
    return lambda data: {"weight": run(data)["out"]}


def _row_topk(data: Data) -> dict[str, Tensor]:
    if data.hidden.device.type == "cpu" and backend.extension() is None:
        raise Missing("the C++ extension was not built")
    return _named(row_topk(data.hidden, int(data.labels[0])))


def _row_topk_truth(data: Data) -> dict[str, Tensor]:
    return _named(by_sorting(data.hidden.clone(), int(data.labels[0])))


def _separately(data: Data) -> dict[str, Tensor]:
    """torch.topk and torch.logsumexp over all; the rest would be lse + log1p(−Σ)."""
    best = data.hidden.topk(int(data.labels[0]), dim=-1)
    lse = data.hidden.logsumexp(-1)
    rest = lse + torch.log1p(-(best.values - lse[:, None]).exp().sum(-1))
    return _named((best.values, best.indices, rest))


def _named(outputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("values", "ids", "lse_rest"), outputs, strict=True))


def _linear_bytes(s: Shape, size: int) -> float:
    return s.V * s.H / 2 + s.N * (s.H + s.V) * size


OPS = {
    "dequant_nf4": Op(
        "NF4 weights [V, H] expanded into 16 bits",
        "forward",
        plain,
        expanded,
        (
            Contender(
                "bitsandbytes",
                _weight(quant_peers.bnb_dequant),
                prepares=True,
                package=BITSANDBYTES,
            ),
            Contender(
                "bitsandbytes, reused",
                _weight(quant_peers.bnb_dequant_reused),
                prepares=True,
                package=BITSANDBYTES,
            ),
            Contender("ours, reused", _weight(_into_scratch), prepares=True),
        ),
        0,
        lambda s, size: s.V * s.H * (0.5 + 4 / 64 + size),
    ),
    "linear_nf4": Op(
        "a linear layer with NF4 weights; bf16 and int4pack multiply other weights",
        "forward",
        plain,
        product("nf4"),
        (
            peer("full precision", quant_peers.full),
            peer("bitsandbytes, eval", quant_peers.bnb4_eval, BITSANDBYTES),
            peer("bitsandbytes, train", quant_peers.bnb4_train, BITSANDBYTES),
            peer("aten int4pack", quant_peers.int4pack, "torch"),
            *(ours("nf4", compute) for compute in ("exact", "int8", "fp8")),
        ),
        2,
        _linear_bytes,
    ),
    "linear_int8": Op(
        "a linear layer with 8-bit weights",
        "forward",
        plain,
        product("int8"),
        (
            peer("full precision", quant_peers.full),
            peer("bitsandbytes LLM.int8", quant_peers.bnb8, BITSANDBYTES),
            peer("oneDNN qlinear", quant_peers.onednn, "torch"),
            peer("aten int8pack", quant_peers.int8pack, "torch"),
            *(ours("int8", compute) for compute in ("exact", "int8", "fp8")),
        ),
        2,
        lambda s, size: s.V * s.H + s.N * (s.H + s.V) * size,
    ),
    "row_topk": Op(
        "the K largest of N rows of V logits, and the log-sum-exp of the rest",
        "forward",
        rows_of_logits,
        _row_topk_truth,
        (
            Contender("torch.topk, logsumexp", _separately, exact=False),
            Contender("ours", _row_topk),
        ),
        0,
        lambda s, size: s.N * s.V * size,
    ),
}
