"""token_scores: the per-token statistics for filtering and selection, from one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.head import LMHead
from ..kernels.row_scores import scores
from ..kernels.token_loss import LossOptions
from ..runtime.backend import resolve_impl
from .arguments import Operands, Reduction, TeacherRows, operands, to_teacher_rows
from .checks import check_labels, check_teacher
from .types import TokenScores, TopK
from .vocab_parallel import gather_logits


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    *,
    labels: Tensor | None = None,
    teacher: TopK | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    check: bool = False,
) -> TokenScores:
    """Return scores of q = softmax(z) per position, z as in `linear_lse_gather`, in one pass.

        entropy −Σ q log q      varentropy Σ q (log q + H)²      margin log q₁ − log q₂

    lse and entropies at `temperature`. With labels, at T=1: nll = −log q(label), and label_rank =
    the number of more probable tokens (0 = top); both 0 at ignored positions. With a teacher taken
    at `temperature`, bucket tail: forward_kl, teacher_mass, student_mass, hellinger =
    √(1 − Σ√(pq)) and acceptance_rate = Σ min(p, q), the probability that speculative decoding
    accepts a token of q. With the tail as one outcome it is an upper bound.

    Args:
        hidden: [N, H] or [B, T, H]. weight: [V, H], the same dtype. labels: int [...].
        teacher: TopK over the same positions.

    Returns:
        TokenScores, fp32 (fp64 from fp64) and int64, [...] each; no gradient, no [N, V].

    Raises:
        ValueError or TypeError that names the argument, what was expected and what was passed.

    Example:
        >>> hidden, weight = torch.randn(5, 16), torch.randn(100, 16)
        >>> teacher = linear_topk(torch.randn(5, 16), weight, k=8)
        >>> scores = token_scores(hidden, weight, teacher=teacher)
        >>> hardest = scores.forward_kl.topk(2).indices
    """
    ops = operands(hidden, LMHead(weight, bias, logit_scale, softcap, valid_vocab, temperature))
    impl = resolve_impl(impl, hidden.device)
    if labels is not None:
        check_labels(labels, hidden, ops.vocab, ignore_index, check)
    head, label_N = ops.head, Reduction(labels, ignore_index=ignore_index).label_N
    teacher_rows = None
    if teacher is not None:
        options = LossOptions(temperature=temperature, impl=impl)
        check_teacher(teacher, hidden, None, vocab=ops.vocab, options=options, check=check)
        teacher_rows = to_teacher_rows(teacher, options, head.dtype)
    if impl == "reference":
        return _reference(ops, label_N, teacher_rows)
    label_u = None
    if label_N is not None:
        unscaled = head._replace(temperature=1.0)
        label_u = gather_logits(ops.hidden, unscaled, label_N.unsqueeze(-1), impl, None)[:, 0]
    answers = None if teacher_rows is None else teacher_rows.teacher
    with torch.autocast(hidden.device.type, enabled=False):
        rows = scores(get_backend(impl), head, ops.hidden, answers, label_N, label_u)
    mass = None if teacher_rows is None else teacher_rows.mass
    result = TokenScores(**rows._asdict(), teacher_mass=mass)
    return TokenScores._make(None if f is None else ops.unflatten(f) for f in result)


def _reference(
    ops: Operands, label_N: Tensor | None, teacher_rows: TeacherRows | None
) -> TokenScores:
    from . import reference

    result = reference.token_scores(ops.hidden, ops.head, label_N)
    if teacher_rows is not None:
        one, T = torch.ones_like(result.lse), ops.head.temperature
        kl, hellinger, tvd = (
            reference.topk_distill(
                ops.hidden,
                ops.head,
                teacher_rows.teacher,
                None,
                one,
                LossOptions(name, temperature=T),
            )
            for name in ("forward_kl", "hellinger", "tvd")
        )
        result = result._replace(
            forward_kl=kl.divergence,
            teacher_mass=teacher_rows.mass,
            student_mass=kl.student_mass,
            hellinger=hellinger.divergence.clamp(min=0).sqrt(),
            acceptance_rate=1 - tvd.divergence,
        )
    return TokenScores._make(None if f is None else ops.unflatten(f) for f in result)
