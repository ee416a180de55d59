"""Convert arguments for the kernels: check, cast, flatten, floor, merge.

All public functions share it, so that an option has one meaning.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.divergences import COMBINED, NAMES, floor_of, minimum_of
from ..kernels.head import LMHead
from ..kernels.token_loss import TAILS, LossOptions, TeacherTopK, merge_answers
from ..runtime import checks, tensor_checks
from .checks import check_head, check_labels, check_vocabulary
from .types import TopK
from .vocab_parallel import Placement, Shard, is_dtensor, nonempty_rows, shard_of


class Operands(NamedTuple):
    """hidden [N, H], the head, and the shape [...] that was flattened to N.

    vocab is the number of real tokens, over all ranks of a vocabulary-parallel head.
    """

    hidden: Tensor
    head: LMHead
    batch_shape: torch.Size
    vocab: int
    shard: Shard | None

    def unflatten(self, rows_N: Tensor) -> Tensor:
        return rows_N.reshape(self.batch_shape + rows_N.shape[1:])


def operands(
    hidden: Tensor, head: LMHead, *, prefix: str = "", placement: Placement | None = None
) -> Operands:
    """Check the arguments, cast as F.linear does under autocast, flatten [..., H] to [N, H].

    With a placement, weight and bias are the rows of this rank; valid_vocab counts all ranks.
    """
    weight, bias = head.weight, head.bias
    for name, value in (("hidden", hidden), ("weight", weight)):
        tensor_checks.tensor(prefix + name, value, tensor_checks.FLOATS)
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
    check_head(hidden, head._replace(weight=weight), prefix)
    shard = None if placement is None else shard_of(placement, weight)
    rows, offset = (weight.shape[0], 0) if shard is None else (shard.rows, shard.offset)
    vocab = check_vocabulary(head.valid_vocab, rows)
    head = LMHead(
        nonempty_rows(weight).contiguous(),
        None if bias is None else nonempty_rows(bias).contiguous(),
        float(head.logit_scale),
        None if head.softcap is None else float(head.softcap),
        max(0, min(weight.shape[0], vocab - offset)),
        float(head.temperature),
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
    teacher: TopK,
    options: LossOptions,
    dtype: torch.dtype = torch.float32,
    mask_N: Tensor | None = None,
) -> TeacherRows:
    """Flatten a checked TopK; rows outside mask_N become empty slots."""
    K = teacher.ids.shape[-1]
    ids = teacher.ids.detach().reshape(-1, K).long().contiguous()
    if mask_N is not None:
        ids = torch.where(mask_N.unsqueeze(-1), ids, -1)
    floor = floor_of(dtype)
    lp = teacher.logprobs.detach().reshape(-1, K).to(dtype).contiguous()
    lp = lp.clamp(min=floor, max=0.0).masked_fill_(ids < 0, floor)
    is_traced = torch.compiler.is_compiling()  # the compiler fuses PyTorch's operators
    merge = merge_answers if is_traced else get_backend(options.impl).merge_answers
    ids, lp, mass = merge(ids, lp)
    log_tail = teacher.tail().detach().reshape(-1).to(dtype).clamp(min=floor, max=0.0)
    if mask_N is not None:
        log_tail = torch.where(mask_N, log_tail, 0.0)
    if options.tail == "renorm_both" and teacher.temperature != options.temperature:
        # On the ids alone, p at T is the answers' p to the power T_answers / T, renormalized.
        lp = (
            (lp * (teacher.temperature / options.temperature))
            .clamp(min=floor)
            .masked_fill(ids < 0, floor)
        )
    return TeacherRows(TeacherTopK(ids, lp, log_tail), mass)


def only_argmax(teacher: TopK) -> TopK:
    """Return answers with all mass on the most probable id; an empty answer stays empty."""
    # In fp64, log p of less than -87 are still told apart.
    all_ids, lp = teacher.ids.flatten(0, -2), teacher.logprobs.detach().flatten(0, -2).double()
    lp = lp.masked_fill(all_ids < 0, -torch.inf).clamp(min=floor_of(lp.dtype))
    merged, lp, _ = merge_answers(all_ids.long(), lp)
    best = lp.masked_fill(merged < 0, -torch.inf).argmax(-1, keepdim=True)
    ids = merged.gather(-1, best).view(*teacher.ids.shape[:-1], 1)
    logprobs = torch.zeros_like(ids, dtype=torch.float32)
    log_tail = logprobs[..., 0].masked_fill(ids[..., 0] >= 0, -torch.inf)
    return TopK(ids, logprobs, log_tail, teacher.temperature)


class LossTerms(NamedTuple):
    """Loss and statistics, [N] each.

    `loss` is Σ coef · ℓ if it was computed itself; otherwise None, and per_token carries the
    gradient.
    """

    loss: Tensor | None
    per_token: Tensor
    divergence: Tensor
    student_mass: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


class Reduction(NamedTuple):
    """Which positions count, their factors, and how their losses are summed."""

    labels: Tensor | None = None
    token_weight: Tensor | None = None
    ignore_index: int = -100
    kind: str = "mean"
    num_items: int | float | Tensor | None = None

    @property
    def counted(self) -> Tensor | None:
        """bool [...]: positions with a label; None if all count."""
        return None if self.labels is None else self.labels != self.ignore_index

    @property
    def label_N(self) -> Tensor | None:
        """int64 [N], −1 at ignored positions."""
        if self.labels is None:
            return None
        flat = self.labels.reshape(-1).long()
        return torch.where(flat == self.ignore_index, -1, flat)


class TokenWeights(NamedTuple):
    """The factor of each token, and which tokens are used.

    coef is the factor of each token in the returned sum. rows are the indices of the used tokens:
    on CPU ignored tokens are dropped before the head. On other devices rows is None and `mask`
    marks the used tokens.
    """

    coef: Tensor
    rows: Tensor | None
    mask: Tensor | None

    def take(self, tensor_N: Tensor) -> Tensor:
        """The used tokens of a tensor [N]."""
        return tensor_N if self.rows is None else tensor_N[self.rows]

    def take_hidden(self, hidden_NH: Tensor) -> Tensor:
        """The hidden states of the used tokens; a NaN at an ignored one must not spread."""
        if self.mask is not None:
            return torch.where(self.mask.unsqueeze(-1), hidden_NH, 0)
        return self.take(hidden_NH)

    def put_back(self, values_n: Tensor, tokens: int) -> Tensor:
        """Values of the used tokens as [N], zero at ignored ones."""
        if self.rows is not None:
            return values_n.new_zeros(tokens).index_copy(0, self.rows, values_n)
        return values_n if self.mask is None else torch.where(self.mask, values_n, 0.0)


def token_weights(ops: Operands, reduction: Reduction) -> TokenWeights:
    """Factors w_n / (num_items or the number of non-ignored tokens) for a mean, else w_n."""
    N, wide = ops.hidden.shape[0], ops.head.dtype
    coef = torch.ones(N, dtype=wide, device=ops.hidden.device)
    mask, num_items = reduction.counted, reduction.num_items
    mask = None if mask is None else mask.reshape(-1)
    if reduction.token_weight is not None:
        coef = reduction.token_weight.reshape(-1).to(wide)
    if mask is not None:
        coef = torch.where(mask, coef, 0.0)
    if reduction.kind == "mean":
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
    reduction: Reduction, hidden: Tensor, vocab: int, options: LossOptions, check: bool
) -> None:
    """Check the positions, and that `options` can be summed like this."""
    kind, token_weight, num_items = reduction.kind, reduction.token_weight, reduction.num_items
    checks.choice("backward", options.backward, ("auto", "fused", "recompute"))
    checks.choice("reduction", kind, ("mean", "sum", "none"))
    if token_weight is not None:
        tensor_checks.tensor("token_weight", token_weight, tensor_checks.FLOATS)
        tensor_checks.like_tokens("token_weight", token_weight, hidden)
    if num_items is not None:
        if kind != "mean":
            checks.fail("num_items", "None unless reduction='mean'", f"with {kind!r}")
        if not isinstance(num_items, Tensor):
            checks.positive("num_items", num_items)
        elif num_items.numel() != 1 or num_items.is_complex():
            got = f"{list(num_items.shape)} of {num_items.dtype}"
            checks.fail("num_items", "a number, or a tensor of one", got)
        elif (
            tensor_checks.values_readable(num_items, False) and not 0 <= num_items.item() < math.inf
        ):
            checks.fail("num_items", "a finite number of 0 or more", num_items.item())
    if reduction.labels is not None:
        check_labels(reduction.labels, hidden, vocab, reduction.ignore_index, check)
    elif options.ce_weight:
        checks.fail("labels", "a tensor when ce_weight > 0", "None")


def check_fused(reduction: Reduction, options: LossOptions) -> None:
    """Check that gradients may be computed in the forward pass, for a scalar."""
    if options.backward == "fused" and reduction.kind == "none":
        checks.fail(
            "backward",
            "'recompute' or 'auto' with reduction='none'",
            "'fused'",
            "gradients taken in the forward pass need a scalar loss",
        )


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
    checks.boolean("allow_biased", allow_biased)
    minimum = minimum_of(divergence, beta, skew, tail)
    if minimum in ("teacher", "argmax") or (minimum is not None and allow_biased):
        return
    if divergence in (*COMBINED, "argmax_ce"):
        reason = (
            "without an outcome for the rest it has no minimum at the teacher. Use tail='bucket'"
        )
    elif minimum is None:
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
    good = ("teacher", "argmax")
    proper = [repr(t) for t in TAILS if minimum_of(divergence, beta, skew, t) in good]
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


def check_options(options: LossOptions) -> None:
    """Check the divergence and the scalars that shape a per-token loss."""
    check_divergence(
        options.divergence, options.beta, options.skew, options.tail, options.allow_biased
    )
    if options.t2_scale not in (True, False):
        checks.fail("t2_scale", "True or False", repr(options.t2_scale))
    checks.between("eta", options.eta, 0, math.inf, below=True)
    checks.between("ce_weight", options.ce_weight, 0, 1)
    checks.between("z_loss", options.z_loss, 0, math.inf, below=True)
