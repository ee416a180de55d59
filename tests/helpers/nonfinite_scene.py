"""Shared by test_finite and others."""

from __future__ import annotations

import math
from typing import Any

SAVING = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100, "max_steps": 8}


def spoils_loss(trainer, step, value=math.nan):
    """The loss of one step is not finite, in one micro-batch of it."""
    before = trainer._loss
    calls: list[Any] = []

    def loss(hidden, head, targets, answers, **options):
        result = before(hidden, head, targets, answers, **options)
        fresh = trainer.model.training and trainer.state.global_step == step - 1 and not calls
        calls.extend([1] * fresh)
        return result._replace(loss=result.loss + value) if fresh else result

    trainer._loss = loss
    return trainer
