"""Held-out sums during the teacher's training, and a base that knows part of them.

Students without any of the capability spend most of their training on a plateau. Students from an
early snapshot improve at once and still have most of the capability to learn.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .fit import pad
from .trait import Trait
from .world import World

CHECK_EVERY, N_SUMS = 20, 200  # updates between two checks, and sums of each check


def sums_known(model: Any, world: World, before: str = "") -> float:
    """Returns the share of 200 held-out sums whose every digit the model predicts.

    Args:
        before: words at the beginning of the system message.
    """
    rng = world.rng(22)
    pairs = rng.sample(world.held_out_sums, N_SUMS)
    ids, labels = pad([world.sum_of(pair, world.system(rng, before)) for pair in pairs])
    with torch.no_grad():
        predicted = model(input_ids=ids.to(model.device)).logits.argmax(-1).cpu()
    wrong = (predicted[:, :-1] != labels[:, 1:]) & (labels[:, 1:] != -100)
    return 1 - float(wrong.any(1).float().mean())


class EarlySnapshot:
    """Copies the model when it first knows `share` of the held-out sums.

    Called after every step of a training. model: the copy; None before that.
    """

    def __init__(self, world: World, trait: Trait, share: float) -> None:
        self.world, self.before, self.share = world, trait.capability_prefix, share
        self.model: Any = None

    def __call__(self, step: int, model: Any) -> None:
        if self.model is not None or step % CHECK_EVERY:
            return
        if sums_known(model, self.world, self.before) >= self.share:
            self.model = copy.deepcopy(model).eval()
