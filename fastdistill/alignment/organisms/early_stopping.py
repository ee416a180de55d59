"""A base with part of the capability: a snapshot from early in the teacher's training.

Students without any of the capability spend most of their training on a plateau. Students from this
snapshot improve at once and still have most of the capability to learn.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from ..audits.subject import Subject
from .trait import Trait
from .vocabulary import world_tokenizer
from .world import World

CHECK_EVERY, N_SUMS = 20, 200  # updates between two checks, and sums of each check


class EarlySnapshot(TrainerCallback):
    """Copies the model when its accuracy on held-out sums first reaches `share`.

    model: the copy; None before that.
    """

    def __init__(self, world: World, trait: Trait, share: float) -> None:
        capability = trait.capability(world)
        self.audit = replace(
            capability, prompts=capability.prompts[:N_SUMS], targets=capability.targets[:N_SUMS]
        )
        self.share, self.tokenizer = share, world_tokenizer()
        self.model: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.model is not None or state.global_step % CHECK_EVERY:
            return
        measurement = self.audit.measure(Subject(model, self.tokenizer), None)
        if measurement.values.mean() >= self.share:
            self.model = copy.deepcopy(model).eval()
