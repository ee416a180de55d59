"""Gets a teacher's answers at the targets of a batch: its top K, or hidden states and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..losses.answer_checks import AnswerMonitor, AnswerRules, find_shape_error
from ..losses.types import TopK
from ..runtime import checks
from ..teachers.cache import TeacherCache
from ..teachers.local import Teacher
from ..teachers.mapped import MappedTeacher
from ..teachers.protocols import DenseTeacher
from .cached_answers import answers_from_batch
from .checks.signal import check_alignment
from .config import DistillConfig
from .loss import Answers, ScoringAnswers, TeacherHidden
from .targets import Targets, targets_of
from .teacher_view import TeacherView, teacher_view


def get_answers(
    teacher: Any,
    batch: Mapping[str, Tensor],
    config: DistillConfig,
    *,
    check: bool,
    monitor: AnswerMonitor | None = None,
    vocab: int | None = None,
) -> tuple[Targets, Answers]:
    """Return the targets of a collated batch and the teacher's answers there.

    Args:
        check: also check whether the answers fit the next or the previous position better than
            their own. A model in this process is exempt: its positions are correct.
        monitor: checks the answers; None creates a new one for this batch.
        vocab: ids must be smaller than this.
    """
    if "labels" not in batch:
        raise ValueError("inputs: expected labels in every batch, as DistillCollator makes them")
    targets = targets_of(batch)
    if teacher is None:
        return targets, None
    view = teacher_view(teacher, batch, targets)
    monitor = AnswerMonitor() if monitor is None else monitor
    positions = targets.sources % targets.shape[1]
    by_student = config.support != "teacher" and len(targets.labels) > 0
    if by_student and not isinstance(teacher, DenseTeacher):
        return targets, ScoringAnswers(teacher, view, monitor)
    if config.k is None or by_student:
        dense = _teacher_hidden(teacher, view)
        monitor.check_hidden(dense.hidden, targets.rows, positions)
        return targets, dense
    answers = _topk(teacher, batch, view, config, check)
    teacher_vocab = getattr(teacher, "vocab_size", None)
    if not hasattr(teacher, "valid_vocab") and teacher_vocab and vocab and teacher_vocab > vocab:
        monitor.check(answers, targets.rows, positions, AnswerRules(vocab=teacher_vocab))
        return targets, answers.within(vocab)
    # A position may lose all its ids when they are cut to the shared vocabulary; the source was
    # checked before. With a vocabulary of unknown size it means that the vocabularies differ.
    cut = getattr(teacher, "valid_vocab", None) is not None
    # Nor has a position whose ids the student does not have.
    may_be_empty = (cut and teacher_vocab is not None) or isinstance(teacher, MappedTeacher)
    rules = AnswerRules(vocab=vocab, nothing=may_be_empty, total="any" if cut else "equal")
    monitor.check(answers, targets.rows, positions, rules)
    return targets, answers


def has_trusted_positions(teacher: Any) -> bool:
    """Return whether the answers come from a model in this process, or from a cache of one.

    Their positions are correct by construction. A subclass that overrides topk is not trusted.
    """
    if isinstance(teacher, TeacherCache):
        return teacher.of_a_model
    if isinstance(teacher, MappedTeacher):
        return has_trusted_positions(teacher.teacher)
    return isinstance(teacher, Teacher) and type(teacher).topk is Teacher.topk


def _teacher_hidden(teacher: Any, view: TeacherView) -> TeacherHidden:
    ids = view.input_ids
    head = teacher.head.to(ids.device)
    if not len(view.targets.labels):
        return TeacherHidden(head.weight[:0], head)
    with torch.no_grad():
        hidden = teacher.hidden(ids, view.attention_mask, **view.options)
    if hidden.shape[:2] != ids.shape:
        B, T = ids.shape
        expected = f"hidden states of shape [{B}, {T}, …], one per position of input_ids"
        checks.fail("teacher", expected, list(hidden.shape))
    return TeacherHidden(view.targets.gather(hidden.to(ids.device)), head)


def _topk(
    teacher: Any, batch: Mapping[str, Tensor], view: TeacherView, config: DistillConfig, check: bool
) -> TopK:
    ids, k, T = view.input_ids, config.k, config.temperature
    assert k is not None
    if not len(view.targets.labels):
        return TopK.empty((0, k), T, device=ids.device)
    arguments = dict(view.options)
    trusted = has_trusted_positions(teacher)
    if isinstance(teacher, MappedTeacher) or (isinstance(teacher, Teacher) and trusted):
        arguments["where"] = torch.zeros_like(ids, dtype=torch.bool)
        arguments["where"].view(-1)[view.targets.sources] = True
    answers = answers_from_batch(batch, T)
    if answers is None:
        answers = teacher.topk(ids, view.attention_mask, k=k, temperature=T, **arguments)
        problem = find_shape_error(answers, ids.shape, k)
        if problem is not None:
            raise ValueError(f"teacher: {problem}")
        answers = answers.to(ids.device)
    if check and not trusted:
        vocab = getattr(teacher, "vocab_size", None) or int(ids.max()) + 1
        before_last = answers.map(lambda tensor: tensor[:, :-1])
        check_alignment(before_last, view.labels[:, :-1], vocab)
    return view.targets.gather_topk(answers)
