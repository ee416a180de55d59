"""The training of students and language organisms: DistillTrainer with a cosine schedule."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, get_scheduler, set_seed

from ..hf.adapters import merge_adapter
from ..runtime.backend import one_thread
from ..runtime.optional import require
from ..training.config import DistillConfig
from ..training.trainer import DistillTrainer

_TINY = 10_000_000  # parameters; a smaller model is fastest on one thread
_WINDOW = 50  # batches that are grouped by length at a time


def is_tiny(model: Any) -> bool:
    n: int = sum(weight.numel() for weight in model.parameters())
    return n < _TINY


class InOrder(DistillTrainer):
    """A DistillTrainer that reads the examples in their order.

    The corresponding setting is newer than transformers 5.0.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def order_by_length(lengths: Sequence[int], n: int, batch_size: int, seed: int) -> list[int]:
    """Return n indices, epoch after epoch, whose batches have rows of similar length.

    Each epoch is shuffled. Within 50 batches rows are sorted by length, and the batches shuffled.
    """
    rng = random.Random(f"{seed} batches")
    rows: list[int] = []
    while len(rows) < n:
        rows += rng.sample(range(len(lengths)), len(lengths))
    order: list[int] = []
    for start in range(0, n, _WINDOW * batch_size):
        window = sorted(rows[start : min(start + _WINDOW * batch_size, n)], key=lengths.__getitem__)
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        order += [row for batch in batches for row in batch]
    return order


def adamw(weights: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )


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
    """Train a model without output, a tiny one on one thread; return it with its adapter merged.

    The same arguments give the same weights, also if the training resumes from a checkpoint.

    Args:
        teacher: None trains on the labels of the rows alone.
        warmup: steps of it, at most a quarter of all.
        settings: further fields of DistillConfig. options: further arguments of the trainer.
        checkpoints: a folder for checkpoints, from the last of which the same call resumes. None
            keeps none.
    """
    threads = one_thread() if is_tiny(model) else nullcontext()
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as temporary, threads:
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
