"""The ids on which a loss compares teacher and student: the top k of one of them, or of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.head import LMHead
from .linear_head import linear_logprobs_at, linear_topk
from .types import TopK

SUPPORTS = ("teacher", "student", "union")


def answers_on(
    support: str,
    *,
    teacher_topk: Callable[[], TopK],
    student_topk: Callable[[], TopK],
    logprobs_at: Callable[[Tensor], TopK],
) -> TopK:
    """Return the teacher's answers on a support.

    Args:
        support: "teacher", "student" or "union". An id of both is in one slot of the union; the
            other slot is empty.
        teacher_topk, student_topk: the k likeliest tokens of each.
        logprobs_at: the teacher's answers at given ids.
    """
    if support == "teacher":
        return teacher_topk()
    ids = student_topk().ids
    if support == "union":
        own = teacher_topk().ids
        repeated = (ids.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
        ids = torch.cat([own, ids.masked_fill(repeated, -1)], -1)
    return logprobs_at(ids)


def answers_of_head(
    support: str,
    k: int,
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    *,
    temperature: float,
    impl: str,
) -> TopK:
    """Return the answers of a teacher's head on a support; hidden and head are the student's."""
    options: dict[str, Any] = {"temperature": temperature, "impl": impl}
    on_teacher = {**teacher_head.options(), **options}
    return answers_on(
        support,
        teacher_topk=lambda: linear_topk(teacher_hidden, teacher_head.weight, k, **on_teacher),
        student_topk=lambda: linear_topk(hidden, head.weight, k, **head.options(), **options),
        logprobs_at=lambda ids: linear_logprobs_at(
            teacher_hidden, teacher_head.weight, ids, **on_teacher
        ),
    )
