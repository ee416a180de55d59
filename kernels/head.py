"""An LM head and the statistics of one pass over it, shared by all backends.

    u = c · tanh(s / c),   s = logit_scale · (W x + b),   z = u / T          (c: softcap, optional)

A pass reads the logits slab by slab. Per token it returns the logits of the given ids (the slots)
and the log-sum-exp of all others; on request also moments of z, the two largest logits and the rank
of the label. Everything else follows from these on [N, S] tensors.

Letters: N tokens, n tokens of this block, H hidden size, V vocabulary (without the padding from
valid_vocab on), S slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .token_loss import ABSENT, NEG

# Least and most bytes of the logits of a chunk; a GPU gives at most this share of its memory, which
# is less than the most for GPUs below 64 GiB. _few_chunks takes more where that saves memory.
CHUNK_BYTES = {"cpu": (32 << 20, 512 << 20), "cuda": (64 << 20, 1 << 30)}
SHARE_OF_GPU = 1 / 64
TILE_TOKENS = 128  # of the library's products on a GPU
# A bfloat16 dW is rounded after every chunk; with more chunks than this it is summed in fp32.
# `python -m benchmarks.carried_gradient` trains with both for 200 steps of 4 chunks (8 seeds).
# The KL to the teacher changes by +0.000003 ± 0.000048, from 1.73566 with fp32. With lr=2e-2 it
# changes by +0.00046 ± 0.00044 after 100 steps, and by −0.0039 ± 0.0029 after 200, from 1.34347.
CARRIED_CHUNKS = {"cpu": 2, "cuda": 4}
MIN_CHUNK_TOKENS = 96
SHARE_OF_MATERIALIZED = 0.38  # target of the fused loss; materialized logits take three fp32 [N, V]


class LMHead(NamedTuple):
    """An LM head: its tensors and the scalars that shape its logits.

    A model's own head has temperature 1; a loss, a score or an answer sets its own.
    """

    weight: Tensor  # [≥V, H]
    bias: Tensor | None = None  # [≥V]
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None  # rows from this one on are padding
    temperature: float = 1.0

    @property
    def vocab_size(self) -> int:
        """V, the number of real tokens."""
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab

    @property
    def dtype(self) -> torch.dtype:
        """The type of logits, statistics and accumulators."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def is_packed(self) -> bool:
        """Whether the weight has no memory of its own: its rows are computed when they are read."""
        return is_traceable_wrapper_subclass(self.weight)

    def scalars(self) -> dict[str, Any]:
        """The scalars as an operator takes them."""
        return dict(zip(self._fields[2:], self[2:], strict=True))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scalars: dict[str, Any]) -> LMHead:
        """The head of an operator, from its tensors and scalars."""
        return cls(weight, bias, *(scalars[name] for name in cls._fields[2:]))

    def whole(self) -> LMHead:
        """Return this head with sharded tensors gathered, without gradient."""

        def gathered(part: Any) -> Any:
            return part.full_tensor().detach() if hasattr(part, "full_tensor") else part

        return self._replace(weight=gathered(self.weight), bias=gathered(self.bias))

    def to(self, device: torch.device) -> LMHead:
        """Return this head on another device; the model is not moved."""
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def options(self) -> dict[str, Any]:
        """Return the keywords of the public losses and scores other than hidden and weight."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "valid_vocab": self.valid_vocab,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """Return dense logits u, padding included, for checks on a few positions."""
        s = F.linear(hidden, self.weight, self.bias) * self.logit_scale
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)


def needed(need: Sequence[bool]) -> dict[str, Any]:
    """Keywords of a backward pass: whether hidden, weight and bias need a gradient."""
    return dict(zip(("need_hidden", "need_weight", "need_bias"), need, strict=True))


class Stats(NamedTuple):
    """Per token: z_ids [n, S] at T; lse_rest, mean_rest = E_rest[z] and lse_base, [n] each."""

    z_ids: Tensor
    lse_rest: Tensor
    mean_rest: Tensor | None
    lse_base: Tensor | None


class RunningLSE:
    """Online log-sum-exp over slabs at one temperature, with moments of z on request.

    The sums are Σ e^{z − top} (z − top)^i, i = 0 .. moments, about the running maximum `top`: mean
    and variance are computed from small numbers.
    """

    def __init__(
        self, top: Tensor, sums: list[Tensor], temperature: float, known: Tensor | None = None
    ) -> None:
        """known: the log-sum-exp of these sums, if a kernel has computed it."""
        self.top, self.sums, self.temperature, self.known = top, sums, temperature, known

    @classmethod
    def empty(cls, tokens: int, like: Tensor, temperature: float, moments: int) -> RunningLSE:
        top = torch.full((tokens,), NEG, dtype=like.dtype, device=like.device)
        return cls(top, [torch.zeros_like(top) for _ in range(moments + 1)], temperature)

    def add(self, u_vn: Tensor) -> None:
        z = u_vn if self.temperature == 1.0 else u_vn / self.temperature
        top = torch.maximum(self.top, z.amax(0))
        d = z - top
        if len(self.sums) == 1:
            self.merge(top, [d.exp_().sum(0)])
            return
        d = d.clamp_(min=-1e4)  # NEG squared would be infinite, and e^-1e4 is zero
        term = d.exp()
        sums = [term.sum(0)]
        for _ in self.sums[1:]:
            term = term.mul_(d)
            sums.append(term.sum(0))
        self.merge(top, sums)

    def merge(self, top: Tensor, sums: list[Tensor]) -> None:
        """Add sums about `top` ≥ self.top."""
        absent = self.top < ABSENT
        shift = torch.where(absent, 0.0, self.top - top)
        decay = torch.where(absent, 0.0, shift.exp())
        old = self.sums
        shifted = [old[0]]
        if len(old) > 1:
            shifted.append(old[1] + shift * old[0])
        if len(old) > 2:
            shifted.append(old[2] + 2 * shift * old[1] + shift.square() * old[0])
        self.sums = [decay * a + b for a, b in zip(shifted, sums, strict=True)]
        self.top, self.known = top, None

    def lse(self) -> Tensor:
        """log-sum-exp [n]; NEG without any token."""
        if self.known is not None:
            return self.known
        return torch.where(self.top < ABSENT, NEG, self.top + self.sums[0].log())

    def mean(self) -> Tensor:
        """E[z] [n]; 0 without any token."""
        return torch.where(self.top < ABSENT, 0.0, self.top + self.sums[1] / self.sums[0])


class Top2(NamedTuple):
    """The two largest u [n, 2] outside the slots, the id of the first, the rank of the label.

    id and above (how many u exceed the label's) are int64 [n].
    """

    u: Tensor
    id: Tensor
    above: Tensor


class Scanned(NamedTuple):
    """u_nS ≥ NEG of the slots at T=1 (NEG if empty), and the running sums of all other tokens."""

    u_nS: Tensor
    rest: RunningLSE
    rest_base: RunningLSE | None
    best: Top2 | None

    def stats(self) -> Stats:
        T = self.rest.temperature
        if T == 1.0:
            z_nS = self.u_nS
        else:
            z_nS = torch.where(self.u_nS < ABSENT, NEG, self.u_nS / T)
        return Stats(
            z_nS,
            self.rest.lse(),
            self.rest.mean() if len(self.rest.sums) > 1 else None,
            None if self.rest_base is None else self.rest_base.lse(),
        )


class DenseRows(NamedTuple):
    """The terms of dz for a chunk with a dense teacher, [n] each.

    dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label]

    psi_size is a bound of |ψ|, where it is far from 1. w is λ of the term "lk_mix".
    """

    lse: Tensor
    teacher_lse: Tensor
    lse_base: Tensor
    on_D: Tensor
    on_q: Tensor
    on_lse: Tensor | None
    on_ce: Tensor | None
    label: Tensor | None
    psi_size: Tensor | None = None
    w: Tensor | None = None


def blocks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def vocabulary_slabs(head: LMHead, rows: int, group: int = 1) -> Iterator[slice]:
    """Slices of the vocabulary; on the meta device the first 3 · group and the last.

    There only the memory counts. It is the same from the third slab on: the first allocates what
    the others reuse, and the second still holds tensors of the first. Where slabs are worked on in
    groups, that holds for groups.
    """
    starts: Sequence[int] = range(0, head.vocab_size, rows)
    if head.weight.is_meta and len(starts) > 3 * group + 1:
        starts = (*starts[: 3 * group], starts[-1])
    for start in starts:
        yield slice(start, min(start + rows, head.vocab_size))


_planned_gpu: ContextVar[float] = ContextVar("_planned_gpu", default=math.inf)


@contextmanager
def on_planned_gpu(memory: float) -> Iterator[None]:
    """Context in which tensors on meta stand for tensors on a GPU with so many bytes of memory."""
    token = _planned_gpu.set(memory)
    try:
        yield
    finally:
        _planned_gpu.reset(token)


def gpu_memory(weight: Tensor) -> float:
    """Return the bytes of memory of the weight's GPU, or of the planned one; ∞ on a CPU."""
    if weight.is_meta:
        return _planned_gpu.get()
    if not weight.is_cuda:
        return math.inf
    return float(torch.cuda.get_device_properties(weight.device).total_memory)


def whole_tiles(chunk: int, tokens: int, device_type: str) -> int:
    """Return the tokens of a chunk without a last tile of the GEMM that is at most half full.

    The number of chunks may grow, but not beyond CARRIED_CHUNKS, where dW would need fp32.
    """
    rest = chunk % TILE_TOKENS
    if device_type == "cpu" or 2 * chunk >= tokens or chunk < TILE_TOKENS:
        return chunk
    if not 0 < rest <= TILE_TOKENS // 2:
        return chunk
    few = CARRIED_CHUNKS.get(device_type, 4)
    return chunk if chunk * few >= tokens > (chunk - rest) * few else chunk - rest


def chunk_tokens(
    head: LMHead, tokens: int, weight_grad: bool, device_type: str | None = None
) -> int:
    """Return the tokens per chunk of the fused loss on a device, that of the head by default.

    The logits of a chunk plus the weight gradient stay below SHARE_OF_MATERIALIZED of three fp32
    [N, V], within CHUNK_BYTES and within SHARE_OF_GPU of the memory of its GPU. A chunk has enough
    tokens that reading W does not dominate. Two chunks are preferred if they fit: a bfloat16 dW
    then needs no fp32 accumulator. On a GPU so are CARRIED_CHUNKS larger ones (`_few_chunks`).
    """
    device_type = device_type or head.weight.device.type
    fitting = _fitting_tokens(head, tokens, weight_grad, device_type)
    chunk = whole_tiles(fitting, tokens, device_type)
    if device_type == "cpu" or not weight_grad:
        return chunk
    return _few_chunks(head, tokens, chunk, head.vocab_size, device_type)


def _fitting_tokens(head: LMHead, tokens: int, weight_grad: bool, device_type: str) -> int:
    """Return `chunk_tokens` before it is rounded to tiles."""
    low, high = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    high = int(max(low, min(high, SHARE_OF_GPU * gpu_memory(head.weight))))
    row_bytes = head.vocab_size * head.dtype.itemsize
    share = int(SHARE_OF_MATERIALIZED * 3 * tokens * row_bytes)
    floor = max(low, MIN_CHUNK_TOKENS * row_bytes)

    def fits(gradient_bytes: int) -> int:
        budget = share - weight_grad * head.weight.numel() * gradient_bytes
        return max(floor, min(high, budget)) // row_bytes

    half = -(-tokens // 2)
    stored = (head.weight.dtype if sums_in_16_bits(head.weight.dtype) else head.dtype).itemsize
    chunk = fits(head.dtype.itemsize)
    saved = weight_grad * head.weight.numel() * (head.dtype.itemsize - stored)
    if half <= fits(stored) or half * row_bytes <= min(high, chunk * row_bytes + saved):
        return half
    even = -(-tokens // -(-tokens // max(1, chunk)))  # the same number of chunks, of equal size
    return max(1, min(chunk, even + -even % 32))


def dw_type(head: LMHead, tokens: int, chunk: int, device_type: str | None = None) -> torch.dtype:
    """The type in which dW is summed over chunks: that of a bfloat16 head if they are few."""
    few = chunk * CARRIED_CHUNKS.get(device_type or head.weight.device.type, 4) >= tokens
    return head.weight.dtype if few and sums_in_16_bits(head.weight.dtype) else head.dtype


def dense_chunk_tokens(
    head: LMHead, tokens: int, weight_grad: bool, device_type: str | None = None
) -> int:
    """Return the tokens per chunk of the fused dense loss, which stores two logits per token.

    Half of `chunk_tokens`; or more, as far as a bfloat16 dW leaves the memory of its fp32 sum.
    """
    device_type = device_type or head.weight.device.type
    chunk = max(1, _fitting_tokens(head, tokens, weight_grad, device_type) // 2)
    chunk = whole_tiles(chunk, tokens, device_type)
    if not weight_grad:
        return chunk
    return _few_chunks(head, tokens, chunk, 2 * head.vocab_size, device_type)


def _few_chunks(
    head: LMHead, tokens: int, chunk: int, logits_per_token: int, device_type: str
) -> int:
    """Return the tokens of CARRIED_CHUNKS chunks if they need no more memory; else `chunk`.

    dW is then summed in bfloat16. Otherwise its fp32 sum is in memory together with the logits, and
    later together with the rounded dW.
    """
    few = -(-tokens // CARRIED_CHUNKS.get(device_type, 4))
    if few <= chunk or dw_type(head, tokens, few, device_type) == head.dtype:
        return chunk
    row = logits_per_token * head.dtype.itemsize
    rounded = head.weight.nbytes
    summed = head.weight.numel() * head.dtype.itemsize
    later = 0 if device_type == "cpu" else rounded
    return few if few * row + rounded <= summed + max(chunk * row, later) else chunk


def sums_in_16_bits(dtype: torch.dtype) -> bool:
    """Whether gradients of a head of this type may be summed in it.

    float16 may not: the range of the sum is known only when it is complete.
    """
    return dtype == torch.bfloat16


def grad_scale_of(
    *grads: Tensor | None, top_bits: int = 7, carried: Tensor | None = None
) -> Tensor:
    """A 0-dim power of two that scales the largest |value| to (2^(top_bits − 1), 2^top_bits].

    float16 ranges from 6e-8 to 65504. Most of a softmax over a vocabulary, divided by the number of
    tokens, lies below. Gradients are linear in `grads`: they are multiplied by the scale before
    they are rounded to float16, and the fp32 product is divided by it. The scale is 1 if all values
    are zero or one is not finite.

    carried: the scale of a sum to which products are added. It is returned where it scales the
    largest |value| to (2^(top_bits − 4), 2^(top_bits + 2)], or where no value is usable.
    """
    sizes = [torch.linalg.vector_norm(g, torch.inf) for g in grads if g is not None and g.numel()]
    top = torch.stack(sizes).amax() if len(sizes) > 1 else sizes[0]
    grad_scale = torch.exp2(top_bits - torch.ceil(torch.log2(top.clamp(min=2.0**-60))))
    usable = (top > 0) & top.isfinite()
    if carried is None:
        return torch.where(usable, grad_scale, 1.0)
    scaled = top * carried
    changes = usable & ((scaled <= 2.0 ** (top_bits - 4)) | (scaled > 2.0 ** (top_bits + 2)))
    return torch.where(changes, grad_scale, carried)


class ScaledGrad(NamedTuple):
    """A gradient times `grad_scale` (0-dim), in the type of its parameter."""

    value: Tensor | None
    grad_scale: Tensor


def round_scaled(wide: Tensor | None, like: Tensor, carried: Tensor | None = None) -> ScaledGrad:
    """Round a complete sum, which carries a scale (1 if None), to the type of `like`.

    For float16 the largest entry is scaled to 2^15, since the upstream factor is not known yet;
    `wide` is overwritten.
    """
    if carried is None:
        scale_type = torch.float64 if like.dtype == torch.float64 else torch.float32
        carried = like.new_ones((), dtype=scale_type)
    if wide is None or like.dtype != torch.float16 or not wide.numel():
        return ScaledGrad(None if wide is None else wide.to(like.dtype), carried)
    grad_scale = grad_scale_of(wide, top_bits=15)
    if wide.is_cuda:  # one pass; on a CPU it would need a second fp32 tensor
        value = torch.mul(wide, grad_scale, out=torch.empty_like(wide, dtype=like.dtype))
    else:
        value = wide.mul_(grad_scale).to(like.dtype)
    return ScaledGrad(value, grad_scale * carried)


def scaled_grads(
    head: LMHead, grads: Stats, carried: Tensor | None = None
) -> tuple[Stats, Tensor | None]:
    """(grads · scale, scale) such that dz fits float16; (grads, None) for other types.

    z_ids holds d(W x) of distinct slots; elsewhere |dz| is at most |g_rest| + |g_base| +
    (1 + log V) |g_mean|, times logit_scale and (except g_base) 1/T.
    """
    if head.weight.dtype != torch.float16:
        return grads, None
    on_z, on_u = head.logit_scale / head.temperature, head.logit_scale
    others = zip(grads[1:], (on_z, on_z, on_u), strict=True)
    sizes = (None if t is None else t * f for t, f in others)
    grad_scale = grad_scale_of(grads.z_ids, *sizes, carried=carried)
    return Stats._make(None if t is None else t * grad_scale for t in grads), grad_scale


def slot_grads(head: LMHead, z_ids_nS: Tensor, g_z_nS: Tensor) -> Tensor:
    """d(W x) of the slots from d z, [n, S]."""
    g = g_z_nS * (head.logit_scale / head.temperature)
    if head.softcap is not None:
        g = g * (1 - (z_ids_nS * (head.temperature / head.softcap)).square())
    return torch.where(z_ids_nS < ABSENT, 0.0, g)
