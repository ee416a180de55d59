"""Vocabulary-major slabs of logits: the loop that all torch functions share.

    u = c · tanh(s / c),   s = logit_scale · (W x + b),   z = u / T          (c: softcap, optional)

A slab is u_vn for a few thousand vocabulary rows and a block of tokens, laid out [v, n]: both
gradient products read it without a transposed copy, W streams in order, and on CPU the library GEMM
is up to a third faster than in [n, v] (measured, M = 128). Logits are fp32 (fp64 from fp64): on
CUDA from the fp32 output of the GEMM, on CPU from a product of the exact 16-bit values in fp32. No
[N, V] tensor exists: a forward pass reuses one slab, the fused loss stores one chunk of tokens
(`chunk_tokens`).

Letters: N tokens, n tokens of this block, H hidden size, V vocabulary (without the padding from
valid_vocab on), v rows of this slab, S slots. `*_T` is a transposed view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .cpu_kernels import CPUKernels, cpu_kernels
from .head import LMHead, RunningLSE, Scanned, Stats, Top2, blocks, grad_scale_of, vocabulary_slabs
from .row_topk import row_topk
from .token_loss import ABSENT, NEG, log_tail_of
from .topk import TopRows

SLAB_BYTES = 8 << 20  # stays in the last-level cache of a CPU and the L2 of a data center GPU
SLAB_ROWS = (64, 4096)
ON_CPU = ("cpu", "meta")  # devices of the compiled kernels; on meta they only allocate
# The top k costs less per logit in long rows: 8192 logits of 512 tokens at a time.
ROW_BYTES, ROW_TOKENS = 16 << 20, 512
SLABS_AT_ONCE = 8  # whose candidates for the top k are sorted together


def slab_rows(head: LMHead, tokens: int) -> int:
    """Rows of a slab that stays in cache; a large vocabulary is never one slab."""
    low, high = SLAB_ROWS
    cached = SLAB_BYTES // (head.dtype.itemsize * max(tokens, 1))
    return max(low, min(high, cached, -(-head.vocab_size // 4)))


def slabs(head: LMHead, tokens: int) -> Iterator[slice]:
    """Vocabulary slices of `slab_rows`."""
    return vocabulary_slabs(head, slab_rows(head, tokens))


class Matmul:
    """GEMMs with fp32 (fp64) results from operands of the head's own type.

    On CPU the library has no 16-bit GEMM with fp32 output. `cpu_kernels` may have one for bfloat16;
    otherwise one fp32 copy of the weight slab is reused.
    """

    def __init__(self, head: LMHead, hidden_nH: Tensor) -> None:
        self.head = head
        self.native = head.weight.dtype == head.dtype
        self.mixed = not self.native and hidden_nH.is_cuda
        kernels = cpu_kernels() if _multiplies_on_cpu(head, hidden_nH) else None
        new_product = None if kernels is None else kernels.new_product
        self.product = None if new_product is None else new_product()
        self._sum_remainders = None if kernels is None else kernels.sum_remainders
        self._lost_n: Tensor | None = None
        self._sums_2n: Tensor | None = None  # Σ ds and Σ |ds|, with a softcap
        self._scratch: Tensor | None = None
        self._slab: tuple[int, int] | None = None
        as_is = self.native or self.mixed or self.product is not None
        self.hidden_Hn = (hidden_nH if as_is else hidden_nH.to(head.dtype)).t()

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

    def logits(self, at: slice, u_vn: Tensor) -> Tensor:
        """u of one slab, at T=1, into `u_vn`."""
        head = self.head
        if self.product is not None:
            self.product(head.weight[at], self.hidden_Hn, u_vn)
        elif self.mixed:
            u_vn.copy_(torch.mm(head.weight[at], self.hidden_Hn, out_dtype=head.dtype))
        else:
            torch.mm(self.weight(at), self.hidden_Hn, out=u_vn)
        return self._shape(u_vn, at, -1)

    def _shape(self, u: Tensor, at: slice, tokens: int) -> Tensor:
        """Turn products into u in place; `tokens` is the dimension of the tokens."""
        head = self.head
        if head.bias is not None:
            u += head.bias[at].to(u.dtype).unsqueeze(tokens)
        if head.logit_scale != 1.0:
            u *= head.logit_scale
        if head.softcap is not None:
            u.mul_(1 / head.softcap).tanh_().mul_(head.softcap)
        return u

    def rows(self, at: slice, u_1n: Tensor) -> Tensor:
        """Return u of one slab, a row per token, [n, v]; `u_1n` is memory for its transpose."""
        if self.product is None:
            return self.logits(at, u_1n[: at.stop - at.start]).t().contiguous()
        u_nv = u_1n.view(-1)[: (at.stop - at.start) * u_1n.shape[1]].view(u_1n.shape[1], -1)
        self.product(self.hidden_Hn.t(), self.head.weight[at].t(), u_nv)
        return self._shape(u_nv, at, -2)

    def grad_scale(self, ds_vn: Tensor) -> Tensor:
        """The factor of ds before it is rounded to the type of the head."""
        if self.head.weight.dtype != torch.float16:
            return ds_vn.new_ones(())
        return grad_scale_of(ds_vn)

    def new_hidden_grad(self, tokens: int) -> Tensor:
        """Return zeros [n, H] in fp32 (fp64), in the layout that `add_hidden_grad` writes."""
        weight, H = self.head.weight, self.head.weight.shape[1]
        if self.product is not None:
            self._lost_n = weight.new_zeros(tokens, dtype=self.head.dtype)
            if self.head.softcap is not None:
                self._sums_2n = weight.new_zeros(2, tokens, dtype=self.head.dtype)
            return weight.new_zeros(tokens, H, dtype=self.head.dtype)
        return weight.new_zeros(H, tokens, dtype=self.head.dtype).t()

    def add_hidden_grad(
        self, at: slice, ds_vn: Tensor, dx_nH: Tensor, *, rounded: bool = False
    ) -> None:
        """Add dsᵀ W[v] to dx in fp32; with `rounded`, ds may be rounded to bfloat16.

        Then `add_lost` adds what the rounding took away, as far as the rows of W are alike.
        """
        dx_Hn = dx_nH.t()
        if self.product is not None:
            W = self.head.weight[at]
            self.product(ds_vn.t(), W, dx_nH, add=True)
            if not rounded:
                self.product(ds_vn.t(), W, dx_nH, add=True, remainder=True)
            elif self._sum_remainders is not None and self._lost_n is not None:
                self._sum_remainders(ds_vn, self._lost_n)
                if self._sums_2n is not None:
                    self._sums_2n[0] += ds_vn.sum(0)
                    self._sums_2n[1] += torch.linalg.vector_norm(ds_vn, 1, 0)
        elif self.mixed:
            W, grad_scale = self.head.weight[at].t(), self.grad_scale(ds_vn)
            part = torch.mm(W, (ds_vn * grad_scale).to(W.dtype), out_dtype=dx_Hn.dtype)
            dx_Hn += part / grad_scale
        else:
            dx_Hn.addmm_(self.weight(at).t(), ds_vn)

    def add_lost(self, dx_nH: Tensor) -> None:
        """Add (Σ_v ds − bfloat16(ds)) · the mean row of W to dx.

        The gradients of a softmax sum to 0, so a direction that all rows of W share cancels in dX,
        while the rounding errors along it add up. With a softcap they sum to 0 in part: where few
        tokens are not saturated, the mean row may be far larger than theirs.
        """
        lost_n = self._lost_n
        if lost_n is not None:
            if self._sums_2n is not None:
                total_n, size_n = self._sums_2n
                lost_n = lost_n * (1 - total_n.abs() / size_n.clamp(min=1e-37))
            W = self.head.weight[: self.head.vocab_size]
            total = torch.mm(W.new_ones(1, W.shape[0]), W)[0]  # a mean in fp32 would copy W
            dx_nH.addr_(lost_n, total.to(self.head.dtype) / max(W.shape[0], 1))

    def add_weight_grad(self, ds_vn: Tensor, dw_vH: Tensor, first: bool) -> None:
        """dw = (first) or += ds x, summed over the block in fp32 and rounded to dw's type."""
        x_nH = self.hidden_Hn.t()
        if self.product is not None:
            self.product(ds_vn, x_nH, dw_vH, add=not first)
            return
        if self.native and first:
            torch.mm(ds_vn, x_nH, out=dw_vH)  # a sixth faster than addmm_ with beta=0
            return
        if self.native:
            dw_vH.addmm_(ds_vn, x_nH)
            return
        if self.mixed:
            grad_scale = self.grad_scale(ds_vn)
            part = (
                torch.mm((ds_vn * grad_scale).to(x_nH.dtype), x_nH, out_dtype=self.head.dtype)
                / grad_scale
            )
        else:
            part = torch.mm(ds_vn, x_nH)
        dw_vH.copy_(part if first else part.add_(dw_vH))


def _multiplies_on_cpu(head: LMHead, hidden_nH: Tensor) -> bool:
    """Return whether the product of `cpu_kernels` takes these operands."""
    both = (head.weight, hidden_nH)
    return not head.is_packed and all(
        t.device.type in ON_CPU and t.dtype == torch.bfloat16 and 1 in t.stride() for t in both
    )


class Slots:
    """Positions of the S given ids of each token in a slab; ids outside it use a spare row."""

    def __init__(self, ids_nS: Tensor) -> None:
        self.ids_Sn = ids_nS.t().contiguous()
        self.gathered: Tensor | None = None

    def index(self, at: slice) -> tuple[Tensor, Tensor]:
        """(row index into a slab of v + 1 rows, which slots are in this slab), [S, n] each."""
        in_slab = (self.ids_Sn >= at.start) & (self.ids_Sn < at.stop)
        return torch.where(in_slab, self.ids_Sn - at.start, at.stop - at.start), in_slab

    def take(self, at: slice, u_vn1: Tensor) -> None:
        """Save the logits of the slots in this slab and replace them by NEG."""
        if self.ids_Sn.shape[0] == 0:
            return
        index, in_slab = self.index(at)
        values = u_vn1.gather(0, index)
        if self.gathered is None:
            self.gathered = torch.full_like(values, NEG)
        torch.where(in_slab, values, self.gathered, out=self.gathered)
        u_vn1.scatter_(0, index, NEG)

    def clear(self, at: slice, ds_vn1: Tensor) -> None:
        """Zero the slots of this slab."""
        if self.ids_Sn.shape[0]:
            ds_vn1.scatter_(0, self.index(at)[0], 0.0)

    def put(self, at: slice, ds_vn1: Tensor, g_Sn: Tensor) -> None:
        """Add the gradients of the slots after `clear`; repeats add up."""
        if self.ids_Sn.shape[0]:
            ds_vn1.scatter_add_(0, self.index(at)[0], g_Sn)


def new_logits_buffer(head: LMHead, tokens: int) -> Tensor:
    """Memory for the logits of up to `tokens` tokens, plus one spare row."""
    return head.weight.new_empty((head.vocab_size + 1) * tokens, dtype=head.dtype)


def logits_view(head: LMHead, buffer: Tensor, tokens: int) -> Tensor:
    """The logits of n tokens in a buffer, [V + 1, n]."""
    return buffer[: (head.vocab_size + 1) * tokens].view(head.vocab_size + 1, tokens)


def scan(
    head: LMHead,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    *,
    moments: int = 0,
    base: bool = False,
    best: bool = False,
    label_u_n: Tensor | None = None,
    buffer: Tensor | None = None,
) -> Scanned:
    """One pass over the head for one block of tokens.

    A buffer receives u of every slab, with NEG in the slots.
    """
    n = hidden_nH.shape[0]
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    u_1n = hidden_nH.new_empty(0, n, dtype=head.dtype)
    running = RunningLSE.empty(n, u_1n, head.temperature, moments)
    running_base = None
    if base and head.temperature != 1.0:
        running_base = RunningLSE.empty(n, u_1n, 1.0, 0)
    top2 = _empty_top2(n, u_1n) if best else None
    for at in slabs(head, n):
        rows = at.stop - at.start
        if buffer is not None:
            u_vn1 = logits_view(head, buffer, n)[at.start : at.stop + 1]
        else:
            if u_1n.shape[0] < rows + 1:
                u_1n = u_1n.new_empty(rows + 1, n)
            u_vn1 = u_1n[: rows + 1]
        u_vn = matmul.logits(at, u_vn1[:rows])
        slots.take(at, u_vn1)
        _add_slab(running, u_vn)
        if running_base is not None:
            _add_slab(running_base, u_vn)
        if top2 is not None:
            top2 = _merge_top2(top2, at, u_vn, label_u_n)
    u_nS = u_1n.new_full((n, ids_nS.shape[1]), NEG)
    if slots.gathered is not None:
        u_nS = slots.gathered.t().clamp(min=NEG).contiguous()  # −inf is NEG, too
    return Scanned(u_nS, running, running_base, top2)


def _kernels_of(u_vn: Tensor) -> CPUKernels | None:
    """Return the compiled kernels for a slab, or None."""
    fits = u_vn.device.type in ON_CPU and u_vn.dtype == torch.float32 and u_vn.stride(1) == 1
    return cpu_kernels() if fits else None


def _add_slab(running: RunningLSE, u_vn: Tensor) -> None:
    """Add a slab to the running sums."""
    kernels = _kernels_of(u_vn)
    if kernels is None:
        running.add(u_vn)
        return
    moments = len(running.sums) - 1
    running.merge(
        *kernels.sum_columns(u_vn, running.top, temperature=running.temperature, moments=moments)
    )


def _empty_top2(n: int, like: Tensor) -> Top2:
    zeros = torch.zeros(n, dtype=torch.int64, device=like.device)
    return Top2(torch.full((n, 2), NEG, dtype=like.dtype, device=like.device), zeros, zeros)


def _merge_top2(best: Top2, at: slice, u_vn: Tensor, label_u_n: Tensor | None) -> Top2:
    """Merge the two largest logits of a slab into `best`; overwrites them in the slab."""
    u, first, above = best
    if label_u_n is not None:
        above = above + (u_vn > label_u_n).sum(0)
    for i in range(min(2, u_vn.shape[0])):
        value, index = u_vn.max(0)
        if i == 0:
            first = torch.where(value > u[:, 0], index + at.start, first)
        u = torch.cat([u, value.unsqueeze(-1)], -1).topk(2, -1).values
        u_vn.scatter_(0, index.unsqueeze(0), NEG)
    return Top2(u, first, above)


def grad_slab_(
    head: LMHead,
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
    kernels = _kernels_of(u_vn)
    if kernels is not None and g_mean_n is None and g_base_n is None:
        factor = g_rest_n * (scale / T)
        kernels.softmax_columns(u_vn, stats.lse_rest, factor, temperature=T, softcap=head.softcap)
        return u_vn
    q1 = None
    if g_base_n is not None and stats.lse_base is not None:
        q1 = (u_vn - stats.lse_base).exp_().mul_(g_base_n * scale)
    cap = None if head.softcap is None else 1 - (u_vn / head.softcap).square_()
    z = u_vn.mul_(1 / T) if T != 1.0 else u_vn
    if g_mean_n is not None and stats.mean_rest is not None:
        tilt = torch.where(z < ABSENT, 0.0, z - stats.mean_rest + 1).mul_(g_mean_n).add_(g_rest_n)
        d = z.sub_(stats.lse_rest).exp_().mul_(tilt).mul_(scale / T)
    else:
        d = z.sub_(stats.lse_rest).exp_().mul_(g_rest_n * (scale / T))
    if q1 is not None:
        d += q1
    return d if cap is None else d.mul_(cap)


def topk(
    head: LMHead,
    hidden_nH: Tensor,
    temperatures: Sequence[float],
    memory: None,
    out: Sequence[TopRows],
) -> None:
    """Write the answers at each temperature to `out`."""
    n, whole = hidden_nH.shape[0], Matmul(head, hidden_nH)
    if whole.product is None or n <= ROW_TOKENS:
        _topk_of_block(head, whole, temperatures, out)
        return
    for at in blocks(n, ROW_TOKENS):
        part = [TopRows(*(t[at] for t in answer)) for answer in out]
        _topk_of_block(head, Matmul(head, hidden_nH[at]), temperatures, part)


def _topk_of_block(
    head: LMHead, matmul: Matmul, temperatures: Sequence[float], out: Sequence[TopRows]
) -> None:
    n, k = out[0].ids.shape
    u_1n = head.weight.new_empty(0, n, dtype=head.dtype)
    answers = [_RunningTopK(k, u_1n) for _ in temperatures]
    slab = slab_rows(head, n)
    if matmul.product is not None:
        slab = max(SLAB_ROWS[1], ROW_BYTES // (4 * max(n, 1)))
    for at in vocabulary_slabs(head, slab, SLABS_AT_ONCE):
        rows = at.stop - at.start
        if u_1n.shape[0] < rows:
            u_1n = u_1n.new_empty(rows, n)
        u_nv = matmul.rows(at, u_1n)
        for T, answer in zip(temperatures, answers, strict=True):
            if T == 1.0 and len(answers) == 1:
                answer.add(at.start, u_nv)
            else:
                answer.add(at.start, u_nv.div_(T) if answer is answers[-1] else u_nv / T)
    for (ids, logprobs, log_tail), answer in zip(out, answers, strict=True):
        z, best_ids = answer.best()
        lse_rest = answer.rest_n
        lse = torch.logaddexp(lse_rest, torch.logsumexp(z, -1))
        ids.copy_(best_ids)
        logprobs.copy_(z.sub_(lse.unsqueeze(-1)))
        log_rest = log_tail_of(logprobs, lse_rest - lse)
        log_tail.copy_(torch.where(lse_rest < ABSENT, -torch.inf, log_rest))


class _RunningTopK:
    """The k largest z so far and the log-sum-exp of all others.

    Candidates of several slabs are sorted at once. What others displace is added to the rest: it is
    a sum, never a difference.
    """

    def __init__(self, k: int, like_1n: Tensor) -> None:
        self.k = k
        self.rest_n = like_1n.new_full((like_1n.shape[1],), -torch.inf)
        self._candidates: list[tuple[Tensor, Tensor]] = []

    def add(self, start: int, z_nv: Tensor) -> None:
        """Add a slab of logits whose first id is `start`."""
        values, ids, rest = row_topk(z_nv, min(self.k, z_nv.shape[1]))
        self._candidates.append((values, ids + start))
        self.rest_n = torch.logaddexp(self.rest_n, rest)
        if len(self._candidates) == SLABS_AT_ONCE:
            self.best()

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the k largest [n, k] by falling value and their ids."""
        values = torch.cat([z for z, _ in self._candidates], -1)
        ids = torch.cat([ids for _, ids in self._candidates], -1)
        z_nk, order = values.topk(min(self.k, values.shape[1]), -1)
        ids_nk = ids.gather(-1, order)
        dropped = values.scatter_(-1, order, -torch.inf).logsumexp(-1)
        self.rest_n = torch.logaddexp(self.rest_n, dropped)
        self._candidates = [(z_nk, ids_nk)]
        return z_nk, ids_nk
