"""Vocabulary-major slabs of logits: the one loop that every torch backend shares.

    u = c · tanh(s / c),   s = logit_scale · (W x + b),   z = u / T          (c: softcap, optional)

A slab is u_vn for a few thousand vocabulary rows and a block of tokens, laid out [v, n]: both
gradient products then read it without a transposed copy, W streams in order, and on CPU the library
GEMM is up to a third faster than in [n, v] (measured, M = 128). Logits are fp32 (fp64 from fp64)
whatever the operands: on CUDA by the GEMM's own fp32 output, on CPU by an fp32 product of the exact
16-bit values. No [N, V] tensor exists: forward-only work reuses one slab, the fused loss keeps one
chunk of tokens (`chunk_tokens`).

Letters: N tokens, n tokens of this block, H hidden, V vocabulary (columns from valid_vocab on do
not exist), v rows of this slab, S slots. `*_T` is a transposed view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import ABSENT, NEG

SLAB_BYTES = 8 << 20  # stays in the last-level cache of a CPU and the L2 of a data-centre GPU
SLAB_ROWS = (64, 4096)
BLOCK_TOKENS = 1024
CHUNK_BYTES = (32 << 20, 512 << 20)
MIN_CHUNK_TOKENS = 96
SHARE_OF_MATERIALISED = 0.38  # the fused loss's target; materialising holds three fp32 [N, V]


class Head(NamedTuple):
    """An LM head: weight [≥V, H], bias [≥V] or None, and the scalars that shape its logits."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    vocab: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of logits, statistics and accumulators."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


class Stats(NamedTuple):
    """One pass over the head for n tokens. z_ids_nS at T; mean_rest is E_rest[z]; [n] each."""

    z_ids: Tensor
    lse_rest: Tensor
    mean_rest: Tensor | None
    lse_base: Tensor | None


def slabs(vocab: int, tokens: int, itemsize: int) -> Iterator[slice]:
    """Vocabulary slices whose slab stays in cache, and never the whole of a large vocabulary."""
    low, high = SLAB_ROWS
    rows = max(low, min(high, SLAB_BYTES // (itemsize * max(tokens, 1)), -(-vocab // 4)))
    for start in range(0, vocab, rows):
        yield slice(start, min(start + rows, vocab))


def blocks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def chunk_tokens(head: Head, tokens: int, weight_grad: bool) -> int:
    """Tokens per chunk of the fused loss: its kept logits plus the weight gradient stay below
    SHARE_OF_MATERIALISED of three fp32 [N, V], within CHUNK_BYTES, and below all tokens, but are
    never so few that reading W dominates.

    Two chunks are preferred where they fit or need no more, since then a 16-bit dW needs no fp32
    accumulator beside it.
    """
    row_bytes = head.vocab * head.dtype.itemsize
    share = int(SHARE_OF_MATERIALISED * 3 * tokens * row_bytes)
    floor = max(CHUNK_BYTES[0], MIN_CHUNK_TOKENS * row_bytes)

    def fits(gradient_bytes: int) -> int:
        budget = share - weight_grad * head.weight.numel() * gradient_bytes
        return max(floor, min(CHUNK_BYTES[1], budget)) // row_bytes

    half, stored = -(-tokens // 2), head.weight.element_size()
    chunk = fits(head.dtype.itemsize)
    saved = weight_grad * head.weight.numel() * (head.dtype.itemsize - stored)
    if half <= fits(stored) or half * row_bytes <= min(CHUNK_BYTES[1], chunk * row_bytes + saved):
        return half
    return max(1, chunk - chunk % 32 if chunk > 32 else chunk)  # whole tiles of the library GEMM


class Matmul:
    """GEMMs with fp32 (fp64) results from operands of the head's own type.

    16-bit operands on CPU go through one reused fp32 copy of the weight slab, since the library has
    no 16-bit GEMM with fp32 output there.
    """

    def __init__(self, head: Head, hidden_nH: Tensor) -> None:
        self.head = head
        self.native = head.weight.dtype == head.dtype
        self.mixed = not self.native and hidden_nH.is_cuda
        self._scratch: Tensor | None = None
        self._slab: tuple[int, int] | None = None
        self.hidden_Hn = (hidden_nH if self.native or self.mixed else hidden_nH.to(head.dtype)).t()

    def weight(self, at: slice) -> Tensor:
        """W[v, H] in accumulator type."""
        if self.native:
            return self.head.weight[at]
        rows, width = at.stop - at.start, self.head.weight.shape[1]
        if self._scratch is None or self._scratch.shape[0] < rows:
            self._scratch = self.head.weight.new_empty(rows, width, dtype=self.head.dtype)
            self._slab = None
        if self._slab != (at.start, at.stop):
            self._scratch[:rows].copy_(self.head.weight[at])
            self._slab = (at.start, at.stop)
        return self._scratch[:rows]

    def products(self, at: slice, out_vn: Tensor) -> None:
        """out = W[v] x."""
        if self.mixed:
            out_vn.copy_(torch.mm(self.head.weight[at], self.hidden_Hn, out_dtype=self.head.dtype))
        else:
            torch.mm(self.weight(at), self.hidden_Hn, out=out_vn)

    def add_hidden_grad(self, at: slice, ds_vn: Tensor, dx_Hn: Tensor) -> None:
        """dx += W[v]ᵀ ds, accumulated in fp32."""
        if self.mixed:
            W, lift = self.head.weight[at].t(), lift_of(self.head, ds_vn)
            part = torch.mm(W, (ds_vn * lift).to(W.dtype), out_dtype=dx_Hn.dtype)
            dx_Hn += part / lift
        else:
            dx_Hn.addmm_(self.weight(at).t(), ds_vn)

    def add_weight_grad(self, ds_vn: Tensor, dw_vH: Tensor, first: bool) -> None:
        """dw = (first) or += ds x, summed over the block in fp32 and rounded to dw's type."""
        x_nH = self.hidden_Hn.t()
        if self.native:
            dw_vH.addmm_(ds_vn, x_nH, beta=0 if first else 1)
            return
        if self.mixed:
            lift = lift_of(self.head, ds_vn)
            part = torch.mm((ds_vn * lift).to(x_nH.dtype), x_nH, out_dtype=self.head.dtype) / lift
        else:
            part = torch.mm(ds_vn, x_nH)
        dw_vH.copy_(part if first else part.add_(dw_vH))


def logits(head: Head, matmul: Matmul, at: slice, u_vn: Tensor) -> Tensor:
    """u of one slab, at T=1, into `u_vn`."""
    matmul.products(at, u_vn)
    if head.bias is not None:
        u_vn += head.bias[at].to(u_vn.dtype).unsqueeze(-1)
    if head.logit_scale != 1.0:
        u_vn *= head.logit_scale
    if head.softcap is not None:
        u_vn.mul_(1 / head.softcap).tanh_().mul_(head.softcap)
    return u_vn


class Slots:
    """Where the S asked ids of each token lie in a slab; ids outside it point at a spare row."""

    def __init__(self, ids_nS: Tensor) -> None:
        self.ids_Sn = ids_nS.t().contiguous()
        self.gathered: Tensor | None = None

    def index(self, at: slice) -> tuple[Tensor, Tensor]:
        """(row index into a slab of v + 1 rows, which slots are in this slab), [S, n] each."""
        here = (self.ids_Sn >= at.start) & (self.ids_Sn < at.stop)
        return torch.where(here, self.ids_Sn - at.start, at.stop - at.start), here

    def take(self, at: slice, u_vn1: Tensor) -> None:
        """Keep the slots' logits of this slab and put NEG in their place."""
        if self.ids_Sn.shape[0] == 0:
            return
        index, here = self.index(at)
        values = u_vn1.gather(0, index)
        if self.gathered is None:
            self.gathered = torch.full_like(values, NEG)
        torch.where(here, values, self.gathered, out=self.gathered)
        u_vn1.scatter_(0, index, NEG)

    def clear(self, at: slice, ds_vn1: Tensor) -> None:
        """Zero the slots of this slab."""
        if self.ids_Sn.shape[0]:
            ds_vn1.scatter_(0, self.index(at)[0], 0.0)

    def put(self, at: slice, ds_vn1: Tensor, g_Sn: Tensor) -> None:
        """Add the slots' gradients where `clear` left zeros (repeats add up)."""
        if self.ids_Sn.shape[0]:
            ds_vn1.scatter_add_(0, self.index(at)[0], g_Sn)


class RunningLSE:
    """Online log-sum-exp over slabs at one temperature, with moments of z on request.

    Sums are of e^{z − top} (z − top)^i, i = 0 .. moments, and shift with the running maximum `top`,
    so that mean and variance come from small numbers.
    """

    def __init__(self, tokens: int, like: Tensor, temperature: float, moments: int) -> None:
        self.top = torch.full((tokens,), NEG, dtype=like.dtype, device=like.device)
        self.sums = [torch.zeros_like(self.top) for _ in range(moments + 1)]
        self.temperature = temperature

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
        """Add sums taken about `top` ≥ self.top."""
        down = torch.where(self.top < ABSENT, 0.0, self.top - top)
        fade = torch.where(self.top < ABSENT, 0.0, down.exp())
        old = self.sums
        shifted = [old[0]]
        if len(old) > 1:
            shifted.append(old[1] + down * old[0])
        if len(old) > 2:
            shifted.append(old[2] + 2 * down * old[1] + down.square() * old[0])
        self.sums = [fade * a + b for a, b in zip(shifted, sums, strict=True)]
        self.top = top

    def lse(self) -> Tensor:
        """[n]; NEG where no token was left."""
        return torch.where(self.top < ABSENT, NEG, self.top + self.sums[0].log())

    def mean(self) -> Tensor:
        """E[z] [n]; 0 where no token was left."""
        return torch.where(self.top < ABSENT, 0.0, self.top + self.sums[1] / self.sums[0])


def scan(
    head: Head,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    *,
    moment: bool,
    base: bool,
    keep_V1n: Tensor | None = None,
) -> Stats:
    """One pass over the head for one block of tokens.

    keep_V1n, when given, receives every slab's u (slots masked with NEG): row v of token n, with
    one spare row at the end.
    """
    n = hidden_nH.shape[0]
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    u_1n = hidden_nH.new_empty(0, n, dtype=head.dtype)
    running = RunningLSE(n, u_1n, head.temperature, int(moment))
    at_one = RunningLSE(n, u_1n, 1.0, 0) if base and head.temperature != 1.0 else None
    for at in slabs(head.vocab, n, head.dtype.itemsize):
        rows = at.stop - at.start
        if keep_V1n is not None:
            u_vn1 = keep_V1n[at.start : at.stop + 1]
        else:
            if u_1n.shape[0] < rows + 1:
                u_1n = u_1n.new_empty(rows + 1, n)
            u_vn1 = u_1n[: rows + 1]
        u_vn = logits(head, matmul, at, u_vn1[:rows])
        slots.take(at, u_vn1)
        running.add(u_vn)
        if at_one is not None:
            at_one.add(u_vn)
    u_Sn = slots.gathered
    if u_Sn is None:
        u_Sn = u_1n.new_full((ids_nS.shape[1], n), NEG)
    z_ids = torch.where(u_Sn.t() < ABSENT, NEG, u_Sn.t() / head.temperature)
    return Stats(
        z_ids,
        running.lse(),
        running.mean() if moment else None,
        at_one.lse() if at_one is not None else None,
    )


def grad_slab_(
    head: Head,
    u_vn: Tensor,
    stats: Stats,
    g_rest_n: Tensor,
    g_mean_n: Tensor | None,
    g_base_n: Tensor | None,
) -> Tensor:
    """Turn a slab of u into the gradient of the raw products W x off the slots, in place.

    r = e^{z − lse_rest};  dz = r (g_rest + g_mean (1 + z − mean))
    du = dz / T + g_base e^{u − lse₁}
    ds = du · (1 − (u / c)²);  d(W x) = logit_scale · ds
    """
    T, scale = head.temperature, head.logit_scale
    at_one = None
    if g_base_n is not None and stats.lse_base is not None:
        at_one = (u_vn - stats.lse_base).exp_().mul_(g_base_n * scale)
    cap = None if head.softcap is None else 1 - (u_vn / head.softcap).square_()
    z = u_vn.mul_(1 / T) if T != 1.0 else u_vn
    if g_mean_n is not None and stats.mean_rest is not None:
        tilt = torch.where(z < ABSENT, 0.0, z - stats.mean_rest + 1).mul_(g_mean_n).add_(g_rest_n)
        d = z.sub_(stats.lse_rest).exp_().mul_(tilt).mul_(scale / T)
    else:
        d = z.sub_(stats.lse_rest).exp_().mul_(g_rest_n * (scale / T))
    if at_one is not None:
        d += at_one
    return d if cap is None else d.mul_(cap)


def lift_of(head: Head, grad: Tensor) -> Tensor:
    """A power of two, 0-dim, that keeps dz inside float16 (1 for every other type).

    float16 ends at 6e-8, where most of a softmax over a vocabulary lies once it is divided by the
    number of tokens. Gradients are linear in `grad`: it is lifted before 16-bit products and the
    lift taken out of their result, or with the upstream scalar.
    """
    if head.weight.dtype != torch.float16 or not grad.numel():
        return torch.ones((), dtype=grad.dtype, device=grad.device)
    return torch.exp2(7 - torch.ceil(torch.log2(grad.abs().amax().clamp(min=1e-30))))


def slot_grads(head: Head, z_ids_nS: Tensor, g_z_nS: Tensor) -> Tensor:
    """d(W x) of the slots from d z, [n, S]."""
    g = g_z_nS * (head.logit_scale / head.temperature)
    if head.softcap is not None:
        g = g * (1 - (z_ids_nS * (head.temperature / head.softcap)).square())
    return torch.where(z_ids_nS < ABSENT, 0.0, g)
