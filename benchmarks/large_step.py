"""python -m benchmarks.large_step WAY CONTENDER N H V K: one process of large_student.py.

Prints one row per line when it is measured: the step, then the longest row under each cap.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fastdistill as fd
from fastdistill.teachers.local import Teacher

from .data import device
from .large_models import CONFIGS, build, narrow, ours
from .memory import held_mb, peak_mb, release
from .packages import installed
from .quant_peers import bnb4_eval
from .registry import Missing, attempt
from .rows import Row
from .run import fill_times, take_turns
from .shapes import Shape
from .train_step import StoredTeacher, gkd_trainer, settings

SHAPE = Shape(N=4096, H=4096, V=151936, K=64)
STUDENT, TEACHER = "qwen3-8b", "qwen3-32b"
FULL, QLORA = "full", "qlora"
CAPS = {FULL: (141, 80), QLORA: (48, 24)}  # GB of 10⁹ bytes, falling
OURS = ("ours", "ours, top 64", "ours, cached")
TURNS = 3
SHORTEST, LONGEST = 256, 1 << 16
RANK = 16


def optimizer(way: str) -> tuple[str, str | None]:
    """The optimizer, and a note if it is used in the place of one whose package is missing."""
    if way != FULL or not torch.cuda.is_available():
        return "adamw_torch", None
    if installed("bitsandbytes") is None:
        return "adamw_torch", "adamw_torch, not adamw_8bit: bitsandbytes is not installed"
    return "adamw_8bit", None


class _Dense(Trainer):
    """The loss without a fused kernel: Σ p (log p − log q) of all logits."""

    teacher: Any
    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logp = (
                self.teacher(**model_inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            )
        logq = model(**model_inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return (
            torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum")
            / num_items_in_batch
        )


class Running:
    """One contender with its models: a step at any length, and the memory it holds."""

    def __init__(self, way: str, contender: str, shape: Shape, folder: str) -> None:
        self.shape, self.contender = shape, contender
        configs = [CONFIGS[name]() for name in (STUDENT, TEACHER)]
        if shape != SHAPE:
            configs = [narrow(config, shape) for config in configs]
        student = self._student(way, configs[0])
        teacher = None
        if contender != "ours, cached":
            quantized = ours("nf4", "exact") if contender in OURS else bnb4_eval
            teacher = build(configs[1], quantized, seed=7)
        self.models = [student, *([] if teacher is None else [teacher])]
        self.trainer = self._trainer(way, student, teacher, folder)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model.train()
        # Its name in newer and in older versions of transformers.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})

    def _student(self, way: str, config: Any) -> Any:
        if way == FULL:
            return build(config)
        from peft import LoraConfig, get_peft_model

        model = build(config, bnb4_eval).requires_grad_(False)
        model.is_loaded_in_4bit = True  # required by peft
        how = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return get_peft_model(model, how)

    def _trainer(self, way: str, student: Any, teacher: Any, folder: str) -> Any:
        optim, _ = optimizer(way)
        if self.contender == "materialised":
            trainer = _Dense(student, settings(TrainingArguments, folder, optim=optim))
            trainer.teacher = teacher
            return trainer
        if self.contender == "TRL GKDTrainer":
            return gkd_trainer(student, teacher, folder, optim=optim, gradient_checkpointing=False)
        if self.contender not in OURS:
            raise Missing(f"unknown contender {self.contender!r}")
        known = StoredTeacher(None, self.shape.V) if teacher is None else Teacher(teacher)
        k = None if self.contender == "ours" else self.shape.K
        args = settings(
            fd.DistillConfig, folder, show_panel=False, check_signal=False, k=k, optim=optim
        )
        return fd.DistillTrainer(student, known, args)

    def batch(self, tokens: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(tokens)
        ids = torch.randint(3, self.shape.V, (1, tokens), generator=g).to(device())
        if self.contender == "ours, cached":
            self.trainer.teacher.answers = answers(tokens, self.shape)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step(self, batch: dict[str, Tensor]) -> None:
        count = (batch["labels"][:, 1:] != -100).sum()
        self.trainer.training_step(self.model, dict(batch), count)
        self.trainer.optimizer.step()
        self.model.zero_grad()

    def fits(self, tokens: int) -> bool:
        """Whether a step of one row of this length runs; its memory is freed either way."""
        batch = self.batch(tokens)
        _, reason = attempt(lambda: self.step(batch))
        if reason is not None and not reason.startswith("out of memory"):
            raise RuntimeError(f"a row of {tokens} tokens: {reason}")
        self.model.zero_grad()
        release()
        return reason is None


def answers(tokens: int, shape: Shape) -> fd.TopK:
    """Synthetic answers of a cache: K different ids per token, and the tail."""
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(1, tokens, shape.K + 1, generator=g).log_softmax(-1).to(device())
    first = torch.randint(shape.V, (1, tokens, 1), generator=g)
    ids = ((first + torch.arange(shape.K)) % shape.V).to(device())
    return fd.TopK(ids, logp[..., :-1].contiguous(), logp[..., -1].contiguous())


def longest(fits: Callable[[int], bool], shortest: int = SHORTEST, most: int = LONGEST) -> int:
    """The longest length up to `most` that fits, to an eighth; 0 if `shortest` does not fit."""
    if not fits(shortest):
        return 0
    low = shortest
    while low < most and fits(2 * low):
        low *= 2
    high = 2 * low
    while low < most and high - low > low // 8:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def rows(way: str, contender: str, shape: Shape, say: Callable[[Row], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        running, reason = attempt(lambda: Running(way, contender, shape, folder))
        first = Row.at(shape, f"large_step_{way}", contender, "both")
        first.note = optimizer(way)[1]
        if running is not None:
            batch = running.batch(shape.N)
            _, reason = attempt(lambda: _measure(first, running, batch))
        first.set_reason(reason)
        say(first)
        if running is None:
            return
        for cap in CAPS[way]:
            row = Row.at(shape, f"longest_row_{way}_{cap}GB", contender, "both")
            row.note = first.note
            row.set_reason(attempt(functools.partial(_longest, row, running, cap))[1])
            say(row)


def _measure(row: Row, running: Running, batch: dict[str, Tensor]) -> None:
    running.step(batch)  # allocates the optimizer's moments
    before_mb = _memory_mb(running)
    row.output_mb = before_mb
    row.peak_mb = before_mb + peak_mb(lambda: running.step(batch))
    take_turns([row], {row.impl: lambda: running.step(batch)}, TURNS)


def _memory_mb(running: Running) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 1e6
    moments = (t for s in running.trainer.optimizer.state.values() for t in s.values())
    return held_mb(*running.models) + sum(t.nbytes for t in moments if torch.is_tensor(t)) / 1e6


def _longest(row: Row, running: Running, cap: int) -> None:
    if not torch.cuda.is_available():
        raise Missing("a cap on memory needs a CUDA device")
    whole = torch.cuda.get_device_properties().total_memory
    if cap * 1e9 > whole:
        raise Missing(f"this GPU has {whole / 1e9:.0f} GB")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap * 1e9 / whole)
    row.N = 0 if _memory_mb(running) > cap * 1e3 else longest(running.fits)
    if row.N:
        batch = running.batch(row.N)
        torch.cuda.synchronize()
        started = time.perf_counter()
        running.step(batch)
        torch.cuda.synchronize()
        fill_times(row, [(time.perf_counter() - started) * 1e3])
        row.timer = "wall clock, one step"


def main() -> None:
    way, contender, *numbers = sys.argv[1:]
    rows(
        way,
        contender,
        Shape(*map(int, numbers)),
        lambda r: print(json.dumps(asdict(r)), flush=True),
    )


if __name__ == "__main__":
    main()
