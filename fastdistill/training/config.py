"""DistillConfig: transformers.TrainingArguments, plus what distillation needs to know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ..backend import resolve_impl
from ..kernels.divergences import NAMES as DIVERGENCES
from ..kernels.rows import TAILS
from ..operands import check_divergence
from ..runtime.json_text import parse_json
from .arguments import (
    LOGGING_SHARE,
    SAVING_SHARE,
    check_arguments,
    check_device,
    direction_of,
    scale_intervals,
    schedule_options,
    steps_in_backward,
)
from .selection import Selection, TokenSelection, selection_of


@dataclass(kw_only=True)
class DistillConfig(TrainingArguments):
    """How to train a student. Everything of TrainingArguments, and:

    Args:
        k: how many of the teacher's likeliest tokens to compare at each position. None compares the
            whole vocabulary, with a teacher that has hidden states and a head.
        divergence: D(teacher, student); "forward_kl" is KL(teacher ‖ student).
        beta: the mixture weight of "jsd". skew: the mixture weight of the skewed divergences.
        tail: what becomes of the mass outside the k tokens; "bucket" compares it as one outcome.
            A pair of divergence and tail that is not smallest at the teacher gives a UserWarning;
            `topk_distill` says which are, and which have no minimum and are refused.
        temperature: softens both distributions. t2_scale: multiply the divergence by T².
        ce_weight: c in (1 − c)·divergence + c·cross-entropy of the labels.
        z_loss: weight of the squared log-sum-exp.
        token_selection: train on some tokens only, by a score of token_scores: "entropy top 0.2",
            "nll bottom 0.5", "margin <= 1.5", "forward_kl weight"; a TokenSelection; or a function
            (TokenScores [N]) -> weights [N]. The others are dropped before the loss.

        lmbda: share of optimiser steps whose completions the student samples itself (GKD, arXiv
            2306.13649); the others train on the data. A prompt is what comes before the first
            target, or the whole row where there is none; with completion_only_loss=False too.
        max_new_tokens: of a sampled completion. sampling_temperature, top_p: how it is sampled.

        max_length: longer examples are cut. None cuts none.
        completion_only_loss: of messages and prompt + completion, only what the assistant says is a
            target.
        packing: a batch's sequences run behind each other in one row, without padding, and apart by
            their positions. The same update, for models whose attention allows it; others are
            refused.
        dtype: of the weights of a student that is given as a path: "float32", "bfloat16",
            "float16", or "auto", as they are stored. None is float32, since in 16 bits updates
            smaller than half a step of the weight vanish; and "auto" with peft_config, where those
            weights stay as they are. bf16=True computes in bfloat16 with float32 weights.
        model_init_kwargs: for from_pretrained, where the student is given as a path.

        impl: "auto", or one implementation that is then used or refused, never replaced.
        backward: of the loss: "fused" makes the head's gradients in the forward pass, "recompute"
            makes the logits again in the backward pass: a third more work at the head, less
            memory. "auto" is fused.
        show_panel: print what the teacher says about the first batch, before the first update.
        check_data: refuse datasets that a look at a few examples shows to teach nothing.
        check_signal: stop where the first batch shows answers that are not about this text.
        nonfinite: what becomes of an update whose loss or gradient is NaN or infinite. "stop"
            raises FloatingPointError before the optimizer's step; "skip" leaves that update out,
            warns, and counts it as `skipped_steps` in the log. An overflow that the loss scaling of
            fp16=True can end is neither.
        save_on_interrupt: the first Ctrl-C or SIGTERM writes a checkpoint at the end of the step
            and then stops, where one process trains and save_strategy is not "no"; the second stops
            at once.

    docs/training-arguments.md lists every field of TrainingArguments: as it is there, with another
    default, or refused.
    """

    # What the command line gives as JSON.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    k: int | None = 64
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    tail: str = "bucket"
    temperature: float = 1.0
    t2_scale: bool = False
    ce_weight: float = 0.0
    z_loss: float = 0.0
    # None second: a command line then reads the words that stand first.
    token_selection: str | None | TokenSelection | Callable[..., Any] = None  # noqa: RUF036

    lmbda: float = 0.0
    max_new_tokens: int = 128
    sampling_temperature: float = 1.0
    top_p: float = 1.0

    max_length: int | None = None
    completion_only_loss: bool = True
    packing: bool = False
    dtype: str | None = None
    model_init_kwargs: dict[str, Any] | str | None = None

    impl: str = "auto"
    backward: str = "auto"
    show_panel: bool = True
    check_data: bool = True
    check_signal: bool = True
    nonfinite: str = "stop"
    save_on_interrupt: bool = True

    # Changed defaults: a short run, too, shows its loss and keeps checkpoints; a loss that is not
    # finite is shown as it is; evaluation that gathered logits would need [tokens, V]; examples may
    # carry columns that the model's forward does not name; pinning needs a GPU and warns without.
    logging_steps: float = field(default=LOGGING_SHARE)
    save_steps: float = field(default=SAVING_SHARE)
    logging_nan_inf_filter: bool = field(default=False)
    prediction_loss_only: bool = field(default=True)
    remove_unused_columns: bool = field(default=False)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_length", 2), ("max_new_tokens", 1)):
            _integer(name, getattr(self, name), least, optional=name != "max_new_tokens")
        _one_of("divergence", self.divergence, DIVERGENCES)
        _one_of("tail", self.tail, TAILS)
        _one_of("backward", self.backward, ("auto", "fused", "recompute"))
        _one_of("nonfinite", self.nonfinite, ("stop", "skip"))
        if self.dtype is not None:
            _one_of("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
            if {"dtype", "torch_dtype"} & set(_json_object(self.model_init_kwargs)):
                raise ValueError(
                    f"dtype: expected None with a dtype in model_init_kwargs, got {self.dtype!r}"
                )
        resolve_impl(self.impl)
        for name in ("beta", "skew", "ce_weight", "lmbda", "top_p"):
            _between(name, getattr(self, name), 0.0, 1.0)
        _between("z_loss", self.z_loss, 0.0, math.inf)
        for name in ("temperature", "sampling_temperature", "top_p"):
            _between(name, getattr(self, name), 0.0, math.inf)
            if getattr(self, name) == 0.0:
                raise ValueError(f"{name}: expected a number above 0, got 0.0")
        check_divergence(self.divergence, self.beta, self.skew, self.tail)
        if self.tail == "renorm_both" and self.k == 1:
            raise ValueError(
                "tail: expected something else than 'renorm_both' with k=1, where both "
                "distributions are the constant 1. Raise k, or use tail='bucket'"
            )
        if self.k is None and self.tail != "bucket":
            raise ValueError(
                f"tail: expected 'bucket' with k=None, got {self.tail!r}: over the whole "
                "vocabulary there is no tail"
            )
        if self.lmbda == 1.0 and self.ce_weight:
            raise ValueError(
                f"ce_weight: expected 0 with lmbda=1, got {self.ce_weight:g}: tokens that the "
                "student sampled are no labels"
            )
        selection_of(self.token_selection)
        check_arguments(self)
        self.greater_is_better = direction_of(self)
        self.lr_scheduler_kwargs = schedule_options(self)
        scale_intervals(self)
        if self.use_cpu:
            self.dataloader_pin_memory = False
        super().__post_init__()
        check_device(self)
        if self.nonfinite == "skip" and (self.deepspeed or steps_in_backward(self)):
            raise ValueError(
                "nonfinite: expected 'stop' with DeepSpeed or LOMO or a layerwise optimizer, got "
                "'skip': there the weights move during the backward pass, before a gradient can be "
                "looked at"
            )

    @property
    def selection(self) -> Selection | None:
        """`token_selection` as a rule."""
        return selection_of(self.token_selection)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"token_selection": _selection_text(self.token_selection)}

    def __getstate__(self) -> dict[str, Any]:
        """Checkpoints hold the arguments; a caller's function is kept there as its name."""
        return self.__dict__ | {"token_selection": _selection_text(self.token_selection)}


def _json_object(value: Any) -> Any:
    """Return what a command line may give as the text of a JSON object."""
    if isinstance(value, str):
        return parse_json(value, "model_init_kwargs", dict)
    return value or {}


def _selection_text(selection: Any) -> str | None:
    if callable(selection) and not hasattr(selection, "score"):
        return f"function {getattr(selection, '__qualname__', type(selection).__name__)}"
    return None if selection is None else str(selection)


def _integer(name: str, value: object, least: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of {least} or more, got {value!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high or math.isinf(value):
        top = "finite" if math.isinf(high) else f"{high:g}"
        raise ValueError(f"{name}: expected a number between {low:g} and {top}, got {value!r}")
