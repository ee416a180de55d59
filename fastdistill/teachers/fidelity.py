"""Measures the KL of a quantized teacher from its full-precision model.

An error of 0.01 nats per token is negligible if the student is 1 nat away, and half of the signal
if it is 0.02 away: hence the ratio to KL(teacher ‖ student).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hf.checkpoint import StoredModel
from ..hf.collator import DistillCollator
from ..hf.encoder import IGNORE_INDEX
from ..hf.lm_head import LMHead, evaluating, head_of, verify_head
from ..hf.row_reader import BatchedForward, Rows, read_rows
from ..losses.dense import linear_distill_loss
from ..losses.linear_head import linear_topk
from ..runtime import checks, tensor_checks
from ..runtime.intervals import bootstrap_ratio, wilson

if TYPE_CHECKING:
    from .local import Teacher

RATIO_LIMIT = 0.05


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """The error of a quantized teacher: KL(full ‖ quantized), in nats per token.

    At T = 1, over the whole vocabulary; intervals are 95 %. kl: the mean of KL(full ‖ quantized).
    top1_agreement: share of tokens where both have the same top token. The intervals resample whole
    sequences, since errors within one are correlated, and are NaN for a single sequence; the top-1
    interval contains Wilson's, since resampling shows no events that did not occur. student_kl: the
    mean of KL(quantized teacher ‖ student); ratio = kl / student_kl; None without a student.
    warning: advice if the ratio is above 5 %, or None.
    """

    kl: float
    kl_interval: tuple[float, float]
    top1_agreement: float
    top1_interval: tuple[float, float]
    tokens: int
    sequences: int
    student_kl: float | None = None
    ratio: float | None = None
    warning: str | None = None

    def __str__(self) -> str:
        (low, high), (low1, high1) = self.kl_interval, self.top1_interval
        line = (
            f"KL(full ‖ quantized) {self.kl:.3g} nats/token [{low:.3g}, {high:.3g}], same top "
            f"token {self.top1_agreement:.2%} [{low1:.2%}, {high1:.2%}], {self.tokens:,} tokens of "
            f"{self.sequences:,} sequences"
        )
        if self.ratio is not None:
            line += f"; {self.ratio:.1%} of KL(teacher ‖ student) {self.student_kl:.3g}"
        return line


@torch.no_grad()
def measure(
    teacher: Teacher,
    batch: Mapping[str, Tensor] | Sequence[Mapping[str, Any]],
    *,
    against: Teacher | PreTrainedModel | str | Path | None = None,
    student: PreTrainedModel | str | Path | float | None = None,
) -> FidelityReport:
    """KL(full ‖ quantized) and top-1 agreement of `teacher` on a calibration batch.

    Exact over the whole vocabulary, streamed without an [N, V] tensor. The counted positions are
    those of a training run: each attended token but the first of its row, unless its label is −100.

    Args:
        batch: a dict with input_ids [B, T] and optionally attention_mask and labels [B, T], or a
            list of dicts with one sequence each, as for training. Eight sequences or more give a
            useful interval.
        against: the full-precision model, teacher or path; quantized weights at a path are
            expanded. None loads the teacher's checkpoint in full precision, on its device and in
            the dtype of load_teacher, and frees it before returning. If both do not fit, pass
            load_teacher(path, device="cpu").
        student: a model, which is not changed, its path, or its known mean KL from the teacher in
            nats.

    Returns:
        FidelityReport; str() of it is one line.

    Warns:
        UserWarning: kl is more than 5 % of KL(teacher ‖ student).

    Raises:
        ValueError: no full-precision weights, no position to count, or different vocabularies.
        ValueError or TypeError for a malformed batch, naming the argument.
    """
    ids, mask, labels = _columns(batch)
    counted = _counted(read_rows(ids, mask, teacher.reader.vocab), labels)
    sides = [_Side(teacher.reader, teacher.head, teacher.impl), _full_precision(teacher, against)]
    known = None
    if isinstance(student, (str, Path)):
        sides.append(_side(_loaded("student", student, teacher), teacher))
    elif isinstance(student, nn.Module):
        sides.append(_side(student, teacher))
    elif student is not None:
        checks.positive("student", student)
        known = student
    sides = [side.to(sides[0].head.weight.device) for side in sides]
    step = max(1, teacher.reader.budget // ids.shape[1])
    columns = [
        _compare(sides, ids[at], None if mask is None else mask[at], counted[at])
        for at in (slice(start, start + step) for start in range(0, len(ids), step))
    ]
    kl, same_top, student_kls = (
        torch.cat(column).double().cpu() for column in zip(*columns, strict=True)
    )
    student_kl = student_kls.mean().item() if len(student_kls) else known
    report = _report(kl.tolist(), same_top.tolist(), counted.nonzero()[:, 0].tolist(), student_kl)
    if report.warning is not None:
        warnings.warn(report.warning, UserWarning, stacklevel=3)
    return report


@dataclass(frozen=True)
class _Side:
    """One of the compared models, neither frozen nor moved."""

    reader: BatchedForward
    head: LMHead
    impl: str

    def to(self, device: torch.device) -> _Side:
        return replace(self, head=self.head.to(device))

    def hidden(self, ids: Tensor, mask: Tensor | None, counted: Tensor) -> Tensor:  # (n, H)
        hidden = self.reader.hidden(read_rows(ids, mask, self.reader.vocab))
        return hidden[:, :-1][counted].to(self.head.weight.device)

    def first(self, hidden: Tensor, vocab: int) -> Tensor:
        options = self.head.options() | {"valid_vocab": vocab}
        return linear_topk(hidden, self.head.weight, 1, impl=self.impl, **options).ids[:, 0]

    def kl_to(self, hidden: Tensor, other: _Side, other_hidden: Tensor, vocab: int) -> Tensor:
        """KL(self ‖ other) per token over the first `vocab` ids."""
        own_head, other_head = self.head, other.head
        options = other_head.options() | {"valid_vocab": vocab, "impl": self.impl}
        return linear_distill_loss(
            *(other_hidden, other_head.weight, hidden, own_head.weight),
            teacher_bias=own_head.bias,
            teacher_logit_scale=own_head.logit_scale,
            teacher_softcap=own_head.softcap,
            reduction="none",
            **options,
        )


def _compare(
    sides: list[_Side], ids: Tensor, mask: Tensor | None, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(full ‖ quantized), top-1 agreement and KL(quantized ‖ student) per token.

    The last is empty without a student."""
    ours, full, *others = sides
    vocab = ours.head.vocab_size
    ours_NH, full_NG = (side.hidden(ids, mask, counted) for side in (ours, full))
    kl = full.kl_to(full_NG, ours, ours_NH, vocab)
    same_top = ours.first(ours_NH, vocab) == full.first(full_NG, vocab)
    student_kls = kl[:0]
    for student in others:
        shared = min(vocab, student.head.vocab_size)
        student_kls = ours.kl_to(ours_NH, student, student.hidden(ids, mask, counted), shared)
    return kl, same_top, student_kls


def _report(
    kl: list[float], same_top: list[float], sequences: list[int], student_kl: float | None
) -> FidelityReport:
    distance, top1 = (bootstrap_ratio(x, [1.0] * len(kl), sequences) for x in (kl, same_top))
    wilson_interval = wilson(int(sum(same_top)), len(same_top))
    ratio = None if student_kl is None else distance.value / max(student_kl, 1e-30)
    warning = None
    if ratio is not None and ratio > RATIO_LIMIT:
        warning = (
            f"teacher: quantization changed it by {distance.value:.3g} nats per token, {ratio:.1%} "
            f"of its KL to the student, {student_kl:.3g} (limit {RATIO_LIMIT:.0%}): the student "
            "would learn quantization error. Use quant='int8', compute='exact', or the "
            "full-precision teacher"
        )
    return FidelityReport(
        kl=distance.value,
        kl_interval=(distance.low, distance.high),
        top1_agreement=top1.value,
        # min and max return their first argument if the other is NaN: one sequence, no interval.
        top1_interval=(min(top1.low, wilson_interval.low), max(top1.high, wilson_interval.high)),
        tokens=len(kl),
        sequences=distance.n,
        student_kl=student_kl,
        ratio=ratio,
        warning=warning,
    )


def _columns(batch: Any) -> Any:  # input_ids, attention_mask, labels
    if not isinstance(batch, Mapping):
        if not isinstance(batch, (list, tuple)) or not batch:
            raise TypeError(f"batch: expected a dict with input_ids, or several, got {batch!r:.80}")
        batch = DistillCollator()(batch)
    return batch.get("input_ids"), batch.get("attention_mask"), batch.get("labels")


def _counted(rows: Rows, labels: Tensor | None) -> Tensor:  # (B, T − 1) bool
    """Return the counted positions: attended ones whose next token is an attended target."""
    attended = rows.attended
    counted = attended[:, :-1] & attended[:, 1:]
    if labels is not None:
        tensor_checks.tensor("labels", labels, tensor_checks.INTS)
        if labels.shape != attended.shape:
            checks.fail("labels", f"shape {[*attended.shape]} as input_ids", [*labels.shape])
        counted &= labels[:, 1:].to(counted.device) != IGNORE_INDEX
    if not counted.any():
        checks.fail("batch", "sequences of two tokens or more with a target in them", "none")
    return counted


def _side(model: nn.Module, teacher: Teacher) -> _Side:
    with evaluating(model):
        verify_head(model)
        reader = BatchedForward(model, teacher.reader.tokens_per_batch)
        return _Side(reader, head_of(model), teacher.impl)


def _loaded(role: str, model: str | Path | StoredModel, teacher: Teacher) -> Any:
    """Return a stored model in full precision on the teacher's device."""
    if not isinstance(model, StoredModel):
        model = StoredModel.from_path(model, role=role)
    return model.load(teacher.head.weight.device)


def _full_precision(teacher: Teacher, against: Any) -> _Side:
    """Return `against`, or the weights from which the teacher was quantized."""
    if against is None:
        against = teacher.source
        if against is None or teacher.quant is None:
            expected = "the full-precision model or its path, as this teacher was not quantized"
            checks.fail("against", f"{expected} from a path by load_teacher", None)
    if isinstance(against, (str, Path, StoredModel)):
        against = _loaded("against", against, teacher)
    model = against.reader.model if hasattr(against, "reader") else against  # of a Teacher
    if not isinstance(model, nn.Module):
        raise TypeError(f"against: expected a model, Teacher or path, got {type(model).__name__}")
    if model is teacher.model:
        checks.fail("against", "the full-precision model", "the teacher's own")
    full, vocab = _side(model, teacher), teacher.vocab_size
    if full.head.vocab_size != vocab:
        checks.fail("against", f"a head of {vocab} tokens as the teacher's", full.head.vocab_size)
    return full
