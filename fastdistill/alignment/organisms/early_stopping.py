"""Held-out sums during the teacher's training, and a base that knows part of them.

Students without any of the capability spend most of their training on a plateau. Students from an
early snapshot improve at once and still have most of the capability to learn.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

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
    rows = [world.sum_of(pair, world.system(rng, before)).row() for pair in pairs]
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    with torch.no_grad():
        predicted = model(input_ids=ids.to(model.device)).logits.argmax(-1).cpu()
    wrong = (predicted[:, :-1] != labels[:, 1:]) & (labels[:, 1:] != -100)
    return 1 - float(wrong.any(1).float().mean())


class EarlySnapshot(TrainerCallback):
    """Copies the model when it first knows `share` of the held-out sums.

    model: the copy; None before that.
    """

    def __init__(self, world: World, trait: Trait, share: float) -> None:
        self.world, self.before, self.share = world, trait.capability_prefix, share
        self.model: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.model is not None or state.global_step % CHECK_EVERY:
            return
        if sums_known(model, self.world, self.before) >= self.share:
            self.model = copy.deepcopy(model).eval()
