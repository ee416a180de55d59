"""Convert arguments for the kernels: check, cast, flatten, floor, merge.

All public functions share it, so that an option has one meaning.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .kernels.divergences import NAMES, floor_of, minimum_of
from .kernels.head import Head
from .kernels.rows import TAILS, LossOptions, TeacherTopK, merge_repeats
from .outputs import TopK
from .parallel import Placement, Shard, is_dtensor, nonempty_rows, shard_of

TAIL_FLOOR = 2.0**-24  # 1 − Σp below this is rounding error, not mass


class Operands(NamedTuple):
    """hidden [N, H], the head, and the shape [...] that was flattened to N.

    vocab is the number of real tokens, over all ranks of a vocabulary-parallel head.
    """

    hidden: Tensor
    head: Head
    batch_shape: torch.Size
    vocab: int
    shard: Shard | None

    def unflatten(self, rows_N: Tensor) -> Tensor:
        return rows_N.reshape(self.batch_shape + rows_N.shape[1:])


def operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    valid_vocab: int | None,
    prefix: str = "",
    placement: Placement | None = None,
) -> Operands:
    """Check the arguments, cast as F.linear does under autocast, flatten [..., H] to [N, H].

    With a placement, weight and bias are the rows of this rank; valid_vocab counts all ranks.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        checks.tensor(prefix + name, value, checks.FLOATS)
        if value.layout != torch.strided or hidden.device.type == "meta":
            got = value.layout if value.layout != torch.strided else "one on the meta device"
            checks.fail(prefix + name, "a dense tensor that holds numbers", got)
        if is_dtensor(value):
            checks.fail(
                prefix + name, "a plain tensor", "a DTensor", f"pass {prefix}{name}.full_tensor()"
            )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        low = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(low), weight.to(low)
    checks.head(hidden, weight, bias, logit_scale, softcap, temperature, prefix)
    shard = None if placement is None else shard_of(placement, weight)
    rows, offset = (weight.shape[0], 0) if shard is None else (shard.rows, shard.offset)
    vocab = checks.vocabulary(valid_vocab, rows)
    head = Head(
        nonempty_rows(weight).contiguous(),
        None if bias is None else nonempty_rows(bias).contiguous(),
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        max(0, min(weight.shape[0], vocab - offset)),
    )
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    return Operands(flat, head, hidden.shape[:-1], vocab, shard)


class TeacherRows(NamedTuple):
    """The teacher's answers for the kernels, and their mass before any renormalization."""

    teacher: TeacherTopK
    mass: Tensor

    def take(self, rows: Tensor) -> TeacherRows:
        return TeacherRows(TeacherTopK(*(t[rows] for t in self.teacher)), self.mass[rows])


def to_teacher_rows(
    teacher: TopK, tail: str, temperature: float, dtype: torch.dtype, mask_N: Tensor | None
) -> TeacherRows:
    """Flatten a checked TopK; rows outside mask_N become empty slots."""
    K = teacher.ids.shape[-1]
    ids = teacher.ids.detach().reshape(-1, K).long()
    if mask_N is not None:
        ids = torch.where(mask_N.unsqueeze(-1), ids, -1)
    floor, empty = floor_of(dtype), ids < 0
    lp = teacher.logprobs.detach().reshape(-1, K).to(dtype)
    lp = torch.where(empty, floor, lp).clamp(min=floor, max=0.0)
    ids, lp = merge_repeats(ids, lp)
    empty = ids < 0
    lp = lp.masked_fill(empty, floor)
    mass = lp.exp().sum(-1)
    if teacher.log_tail is None:
        inside = lp.double().exp().sum(-1).clamp(max=1 - TAIL_FLOOR)
        log_tail = torch.log1p(-inside).to(dtype)
    else:
        log_tail = teacher.log_tail.detach().reshape(-1).to(dtype).clamp(min=floor, max=0.0)
    if mask_N is not None:
        log_tail = torch.where(mask_N, log_tail, 0.0)
    if tail == "renorm_both" and teacher.temperature != temperature:
        # On the ids alone, p at T is the answers' p to the power T_answers / T, renormalized.
        lp = (lp * (teacher.temperature / temperature)).clamp(min=floor).masked_fill(empty, floor)
    return TeacherRows(TeacherTopK(ids, lp, log_tail), mass)


class TokenWeights(NamedTuple):
    """The factor of each token, and which tokens are used.

    coef is the factor of each token in the returned sum. rows are the indices of the used tokens:
    on CPU ignored tokens are dropped before the head. On other devices rows is None and `mask`
    marks the used tokens.
    """

    coef: Tensor
    rows: Tensor | None
    mask: Tensor | None


def token_weights(
    ops: Operands,
    labels: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> TokenWeights:
    """Factors w_n / (num_items or the number of non-ignored tokens) for a mean, else w_n."""
    N, wide = ops.hidden.shape[0], ops.head.dtype
    coef = torch.ones(N, dtype=wide, device=ops.hidden.device)
    mask = None if labels is None else labels.reshape(-1) != ignore_index
    if token_weight is not None:
        coef = token_weight.reshape(-1).to(wide)
    if mask is not None:
        coef = torch.where(mask, coef, 0.0)
    if reduction == "mean":
        if num_items is None:
            num_items = N if mask is None else mask.sum()
        if isinstance(num_items, Tensor):
            coef = coef / num_items.to(coef).reshape(()).clamp(
                min=1e-12 if num_items.is_floating_point() else 1
            )
        else:
            coef = coef / max(num_items, 1e-12)
    if mask is None or ops.hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return TokenWeights(coef, None, mask)
    if bool(mask.all()):
        return TokenWeights(coef, None, None)
    rows = mask.nonzero()[:, 0]
    return TokenWeights(coef[rows], rows, None)


def check_reduction(
    reduction: str,
    num_items: int | float | Tensor | None,
    token_weight: Tensor | None,
    hidden: Tensor,
) -> None:
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if token_weight is not None:
        checks.tensor("token_weight", token_weight, checks.FLOATS)
        checks.like_tokens("token_weight", token_weight, hidden)
    if num_items is not None:
        if reduction != "mean":
            checks.fail("num_items", "None unless reduction='mean'", f"with {reduction!r}")
        if not isinstance(num_items, Tensor):
            checks.positive("num_items", num_items)
        elif num_items.numel() != 1 or num_items.is_complex():
            got = f"{list(num_items.shape)} of {num_items.dtype}"
            checks.fail("num_items", "a number, or a tensor of one", got)
        elif checks.values_readable(num_items, False) and not 0 <= num_items.item() < math.inf:
            checks.fail("num_items", "a finite number of 0 or more", num_items.item())


def check_divergence(
    divergence: Any, beta: float, skew: float, tail: str = "bucket", allow_biased: bool = False
) -> None:
    """Check a divergence, its scalars and its tail.

    A pair whose minimum is not at the teacher is an error, unless it has one at the renormalized
    teacher and `allow_biased` is True. Over a whole vocabulary the tail is "bucket".
    """
    if not callable(divergence):
        checks.choice("divergence", divergence, NAMES)
    checks.between("beta", beta, 0, 1)
    checks.between("skew", skew, 0, 1, below=True)
    checks.choice("tail", tail, TAILS)
    if allow_biased not in (True, False):
        checks.fail("allow_biased", "True or False", repr(allow_biased))
    minimum = minimum_of(divergence, beta, skew, tail)
    if minimum == "teacher" or (minimum is not None and allow_biased):
        return
    if minimum is None:
        reason = (
            "KL(student ‖ teacher) is infinite where the teacher is zero, so this pair has no "
            "minimum at any teacher. Use tail='bucket'"
        )
    else:
        reason = (
            "this pair is smallest where the student is the teacher renormalized over its k "
            "tokens, so it moves all probability onto them. Use tail='bucket', or "
            "allow_biased=True if that is the loss you want"
        )
    proper = [repr(t) for t in TAILS if minimum_of(divergence, beta, skew, t) == "teacher"]
    pair = _in_words(divergence, beta, skew)
    checks.fail("tail", f"{' or '.join(proper)} with {pair}", repr(tail), reason)


def _in_words(divergence: str, beta: float, skew: float) -> str:
    """The divergence, with the scalar that turns it into another one."""
    at = ""
    if divergence == "jsd" and beta in (0, 1):
        at = f" at beta={beta:g}"
    elif divergence.startswith("skew") and skew == 0:
        at = f" at skew={skew:g}"
    return f"divergence={divergence!r}{at}"


def check_mix(options: LossOptions, allow_biased: bool = False) -> None:
    """Check the divergence and the scalars that shape a per-token loss."""
    check_divergence(options.divergence, options.beta, options.skew, options.tail, allow_biased)
    if options.t2_scale not in (True, False):
        checks.fail("t2_scale", "True or False", repr(options.t2_scale))
    checks.between("ce_weight", options.ce_weight, 0, 1)
    checks.between("z_loss", options.z_loss, 0, math.inf, below=True)
