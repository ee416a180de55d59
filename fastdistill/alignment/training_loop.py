"""The training of organisms and students: DistillTrainer with a cosine schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, get_scheduler, set_seed

from ..hf.adapters import merge_adapter
from ..runtime.backend import one_thread
from ..runtime.optional import require
from ..training.config import DistillConfig
from ..training.trainer import DistillTrainer


def adamw(weights: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def lora(rank: int, argument: str) -> Any:
    """Return a LoRA configuration for all linear layers; `argument` is the one that needs peft."""
    peft = require("peft", argument, "'fastdistill[peft]'")
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def train(
    model: Any,
    teacher: Any,
    rows: list[Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup: int,
    settings: Mapping[str, Any],
    optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw,
    trainer: type[DistillTrainer] = DistillTrainer,
    checkpoints: Path | None = None,
    **options: Any,
) -> Any:
    """Train a model on one thread, without output, and return it with its adapter merged.

    The same arguments give the same weights, also if the training resumes from a checkpoint.

    Args:
        teacher: None trains on the labels of the rows alone.
        warmup: steps of it, at most a quarter of all.
        settings: further fields of DistillConfig. options: further arguments of the trainer.
        checkpoints: a folder for checkpoints, from the last of which the same call resumes. None
            keeps none.
    """
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as temporary, one_thread():
        defaults: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no" if checkpoints is None else "steps",
            "save_total_limit": 1,
            "disable_tqdm": True,
            "report_to": [],
            "show_panel": False,
        }
        args = DistillConfig(str(checkpoints or temporary), **{**defaults, **settings})
        set_seed(
            args.seed
        )  # the trainer does that too, but after the adapter has its first weights
        loop = trainer(model, teacher, args, train_dataset=rows, **options)
        loop.remove_callback(PrinterCallback)
        weights = [p for p in loop.model.parameters() if p.requires_grad]
        loop.optimizer = optimizer(weights, learning_rate)
        loop.lr_scheduler = get_scheduler(
            "cosine",
            loop.optimizer,
            num_warmup_steps=min(warmup, steps // 4),
            num_training_steps=steps,
        )
        loop.train(None if checkpoints is None else "auto")
    trained: Any = loop.model
    return (merge_adapter(trained) if hasattr(trained, "merge_and_unload") else trained).eval()
