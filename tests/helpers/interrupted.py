"""Runs that stop before their end, and save on the way."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 6,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.step
