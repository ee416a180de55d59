"""A base that knows some of the capability: the teacher's own training, stopped early.

Students that begin without any of it spend most of their training on a plateau. From here they
leave it at once, and most of the capability is still theirs to take over.
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

CHECK_EVERY, N_SUMS = 20, 200  # updates between two looks, and sums of each


class EarlySnapshot(TrainerCallback):
    """Keeps the model as it was when it first got `share` of held-out sums right.

    model: what was kept; None while it has not come that far.
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
