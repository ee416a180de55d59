"""DistillConfig: transformers.TrainingArguments with the options of distillation."""

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
    """Options of a training run: those of TrainingArguments, and the following.

    Args:
        k: number of the teacher's most likely tokens to compare at each position. None compares
            the whole vocabulary and needs a teacher with hidden states and a head.
        divergence: D(teacher, student); "forward_kl" is KL(teacher ‖ student).
        beta: the mixture weight of "jsd". skew: the mixture weight of the skewed divergences.
        tail: treatment of the probability outside the k tokens; "bucket" compares it as one
            outcome. A pair of divergence and tail whose minimum is not at the teacher is an error.
        allow_biased: accept a pair whose minimum is at the renormalized teacher: "forward_kl" with
            "truncate", and "renorm_teacher". See `topk_distill`.
        temperature: softens both distributions. t2_scale: multiply the divergence by T².
        ce_weight: c in (1 − c)·divergence + c·cross-entropy of the labels.
        z_loss: weight of the squared log-sum-exp.
        token_selection: train on some tokens only, by a score of token_scores: "entropy top 0.2",
            "nll bottom 0.5", "margin <= 1.5", "forward_kl weight"; a TokenSelection; or a function
            (TokenScores [N]) -> weights [N]. Other tokens are dropped before the loss.

        lmbda: fraction of optimizer steps that train on completions sampled by the student (GKD,
            arXiv 2306.13649); the others train on the data. The prompt is everything before the
            first target, or the whole row if it has none; with completion_only_loss=False too.
        max_new_tokens: maximum length of a sampled completion. sampling_temperature, top_p: its
            sampling parameters.

        max_length: cut longer examples to this length. None does not cut.
        completion_only_loss: in messages and prompt + completion, only the assistant's tokens are
            targets.
        packing: concatenate the sequences of a batch in one row without padding, separated by
            their positions. Gives the same update; a model whose attention does not support it
            raises an error.
        dtype: weight type of a student loaded from a path: "float32", "bfloat16", "float16", or
            "auto" for the stored type. None is float32, because 16-bit weights lose updates
            smaller than half a step of the weight; with peft_config, None is "auto", because those
            weights do not change. bf16=True computes in bfloat16 with float32 weights.
        model_init_kwargs: arguments of from_pretrained for a student loaded from a path.

        impl: "auto", or an implementation that is used or raises an error, without fallback.
        backward: how the loss computes gradients: "fused" computes the head's gradients in the
            forward pass; "recompute" recomputes the logits in the backward pass, with a third more
            work at the head and less memory. "auto" is fused.
        show_panel: print a report on the teacher at the first batch, before the first update.
        check_data: check some examples, and raise an error for datasets without a learning signal.
        check_signal: stop if the first batch shows that the answers are not about this text.
        nonfinite: treatment of an update whose loss or gradient is NaN or infinite. "stop" raises
            FloatingPointError before the optimizer's step; "skip" skips the update, warns, and
            counts it as `skipped_steps` in the log. Neither applies to an overflow that the loss
            scaling of fp16=True can resolve.
        save_on_interrupt: the first Ctrl-C or SIGTERM writes a checkpoint at the end of the step
            and then stops, if one process trains and save_strategy is not "no"; the second stops
            immediately.

    docs/training-arguments.md lists every field of TrainingArguments: unchanged, with another
    default, or unsupported.
    """

    # Fields that the command line accepts as JSON.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    k: int | None = 64
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    tail: str = "bucket"
    allow_biased: bool = False
    temperature: float = 1.0
    t2_scale: bool = False
    ce_weight: float = 0.0
    z_loss: float = 0.0
    # str comes before None so that the command line parses text.
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

    # Changed defaults: short runs log their loss and keep checkpoints too; a loss that is not
    # finite is logged as it is; gathering logits in evaluation needs [tokens, V]; examples may have
    # columns that the model's forward does not name; pinning needs a GPU and warns without one.
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
        check_divergence(self.divergence, self.beta, self.skew, self.tail, self.allow_biased)
        if self.tail == "renorm_both" and self.k == 1:
            raise ValueError(
                "tail: expected a tail other than 'renorm_both' with k=1, where both "
                "distributions are the constant 1. Raise k, or use tail='bucket'"
            )
        if self.k is None and self.tail != "bucket":
            raise ValueError(
                f"tail: expected 'bucket' with k=None, got {self.tail!r}: the whole vocabulary "
                "has no tail"
            )
        if self.lmbda == 1.0 and self.ce_weight:
            raise ValueError(
                f"ce_weight: expected 0 with lmbda=1, got {self.ce_weight:g}: tokens that the "
                "student sampled cannot serve as labels"
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
                "nonfinite: expected 'stop' with DeepSpeed, LOMO or a layerwise optimizer, got "
                "'skip': they update weights during the backward pass, before the gradient can be "
                "checked"
            )

    @property
    def selection(self) -> Selection | None:
        """The parsed `token_selection`, or None."""
        return selection_of(self.token_selection)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"token_selection": _selection_text(self.token_selection)}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, where a caller's selection function becomes its name."""
        return self.__dict__ | {"token_selection": _selection_text(self.token_selection)}


def _json_object(value: Any) -> Any:
    """Return a dict, parsed from JSON text if it comes from the command line."""
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
