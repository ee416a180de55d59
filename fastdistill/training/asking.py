"""What a teacher says at the targets of a batch: its top K, or hidden states for its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cache import TeacherCache
from ..outputs import TopK
from ..teacher import Teacher
from .answer_checks import refuse_misaligned
from .config import DistillConfig
from .objective import Answers, Dense
from .offline import answers_in
from .targets import Targets, targets_of


def ask(
    teacher: Any, batch: Mapping[str, Tensor], config: DistillConfig, *, check: bool
) -> tuple[Targets, Answers]:
    """The targets of a collated batch and the teacher's answers there, on the batch's device.

    `check`: also whether answers of a teacher other than a model in this process, whose positions
    nothing guarantees, fit the next position or the previous one better than their own.
    """
    if "labels" not in batch:
        raise ValueError("inputs: expected labels in every batch, as DistillCollator makes them")
    targets = targets_of(batch)
    if teacher is None:
        return targets, None
    if config.k is None:
        return targets, _dense(teacher, batch, targets)
    return targets, _topk(teacher, batch, targets, config, check)


def answers_here(teacher: Any) -> bool:
    """Whether the answers are a model's in this process, or kept from one, whose positions are
    right by construction (a subclass with a topk of its own may answer from anywhere)."""
    if isinstance(teacher, TeacherCache):
        return teacher.of_a_model
    return isinstance(teacher, Teacher) and type(teacher).topk is Teacher.topk


def _dense(teacher: Any, batch: Mapping[str, Tensor], targets: Targets) -> Dense:
    ids = batch["input_ids"]
    head = teacher.head.on(ids.device)
    if not len(targets.labels):
        return Dense(head.weight[:0], head)
    with torch.no_grad():
        hidden = teacher.hidden(ids, batch["attention_mask"])
    if hidden.shape[:2] != ids.shape:
        raise ValueError(_wrong_shape("hidden states", ids, hidden))
    return Dense(targets.of(hidden.to(ids.device)), head)


def _topk(
    teacher: Any,
    batch: Mapping[str, Tensor],
    targets: Targets,
    config: DistillConfig,
    check: bool,
) -> TopK:
    ids, mask, k = batch["input_ids"], batch["attention_mask"], config.k
    assert k is not None
    if not len(targets.labels):
        none = torch.empty(0, k, device=ids.device)
        return TopK(none.long(), none, none[:, 0], config.temperature)
    asked = {}
    here = answers_here(teacher)
    if isinstance(teacher, Teacher) and here:
        asked["where"] = torch.zeros_like(ids, dtype=torch.bool)
        asked["where"].view(-1)[targets.sources] = True
    answers = answers_in(batch, config.temperature)
    if answers is None:
        answers = teacher.topk(ids, mask, k=k, temperature=config.temperature, **asked)
        answers = answers.to(ids.device)
    if answers.ids.shape[:2] != ids.shape:
        raise ValueError(_wrong_shape("answers", ids, answers.ids))
    if check and not here:
        refuse_misaligned(_before_last(answers), batch["labels"][:, 1:], _vocabulary(teacher, ids))
    return targets.of_topk(answers)


def _wrong_shape(what: str, ids: Tensor, got: Tensor) -> str:
    B, T = ids.shape
    return (
        f"teacher: expected {what} of shape [{B}, {T}, …], one per position of input_ids, got "
        f"{list(got.shape)}"
    )


def _before_last(answers: TopK) -> TopK:
    tail = None if answers.log_tail is None else answers.log_tail[:, :-1]
    return TopK(answers.ids[:, :-1], answers.logprobs[:, :-1], tail, answers.temperature)


def _vocabulary(teacher: Any, ids: Tensor) -> int:
    return getattr(teacher, "vocab_size", None) or int(ids.max()) + 1
