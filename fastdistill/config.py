"""DistillConfig: transformers.TrainingArguments, plus what distillation needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .backend import resolve_impl
from .kernels.divergences import NAMES as DIVERGENCES
from .kernels.rows import TAILS

# Options of TrainingArguments that change or replace the model's own loss. Here that loss is never
# computed, so each of these would be ignored without a word.
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "the teacher's distribution already smooths the labels",
    "use_liger_kernel": "the loss here is fused already",
    "torch_compile": "the loss is taken at the output head by hooks, which would recompile it",
}


@dataclass(kw_only=True)
class DistillConfig(TrainingArguments):
    """How to train a student. Everything of TrainingArguments, and:

    Args:
        k: how many of the teacher's likeliest tokens to compare at each position.
        divergence: D(teacher, student); "forward_kl" is KL(teacher ‖ student).
        beta: the mixture weight of "jsd". skew: the mixture weight of the skewed divergences.
        tail: what becomes of the mass outside the k tokens; "bucket" compares it as one outcome.
        temperature: softens both distributions. t2_scale: multiply the divergence by T².
        ce_weight: c in (1 − c)·divergence + c·cross-entropy of the labels.
        z_loss: weight of the squared log-sum-exp.
        impl: "auto", or one implementation that is then used or refused, never replaced.
        show_panel: print what the teacher says about the first batch, before the first update.
    """

    k: int = 64
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    tail: str = "bucket"
    temperature: float = 1.0
    t2_scale: bool = False
    ce_weight: float = 0.0
    z_loss: float = 0.0
    impl: str = "auto"
    show_panel: bool = True

    # Changed defaults: evaluation that gathered logits would need [tokens, V]; examples may carry
    # columns that the model's forward does not name; pinning needs a GPU and warns without one.
    prediction_loss_only: bool = field(default=True)
    remove_unused_columns: bool = field(default=False)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: expected an integer of 1 or more, got {self.k!r}")
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("tail", self.tail, TAILS)
        resolve_impl(self.impl)
        for name in ("beta", "skew", "ce_weight"):
            _between(name, getattr(self, name), 0.0, 1.0)
        _between("z_loss", self.z_loss, 0.0, math.inf)
        _between("temperature", self.temperature, 0.0, math.inf)
        if self.temperature == 0.0:
            raise ValueError("temperature: expected a number above 0, got 0.0")
        if self.tail == "renorm_both" and self.k == 1:
            raise ValueError(
                "tail: expected something else than 'renorm_both' with k=1, where both "
                "distributions are the constant 1. Raise k, or use tail='bucket'"
            )
        for name, reason in _WITHOUT_EFFECT.items():
            if getattr(self, name):
                raise ValueError(
                    f"{name}: expected it unset, got {getattr(self, name)!r}: {reason}"
                )
        if self.use_cpu:
            self.dataloader_pin_memory = False
        super().__post_init__()


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high or math.isinf(value):
        top = "finite" if math.isinf(high) else f"{high:g}"
        raise ValueError(f"{name}: expected a number between {low:g} and {top}, got {value!r}")
