"""DistillConfig: transformers.TrainingArguments with the options of distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ..kernels.divergences import NAMES as DIVERGENCES
from ..kernels.token_loss import TAILS
from ..losses.arguments import check_divergence
from ..losses.support import SUPPORTS
from ..runtime import checks
from ..runtime.backend import resolve_impl
from ..runtime.json_text import parse_json
from .arguments import (
    LOGGING_SHARE,
    SAVING_SHARE,
    check_arguments,
    check_device,
    check_token_batches,
    direction_of,
    scale_intervals,
    schedule_options,
    steps_in_backward,
)
from .token_selection import Selection, TokenSelection, selection_of


@dataclass(kw_only=True)
class DistillConfig(TrainingArguments):
    """Options of a training run: those of TrainingArguments, and the following.

    Args:
        k: number of the teacher's most likely tokens to compare at each position. None compares
            the whole vocabulary and needs a teacher with hidden states and a head.
        support: whose k most likely tokens these are: "teacher", "student", or "union", the tokens
            of both. The teacher scores the student's tokens: a model or a server of `fastdistill
            serve` can, a cache cannot. Use "student" or "union" for the reverse KL and the JSD.
        divergence: D(teacher, student); "forward_kl" is KL(teacher ‖ student).
        beta: the mixture weight of "jsd". skew: the mixture weight of the skewed divergences. eta:
            how fast "lk_hybrid" turns from KL to total variation.
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
        chat_template: used instead of the tokenizer's, and saved with the student: the Jinja text
            of a template, or the path of a file with it.
        train_on_template_tokens: False leaves out what the chat template writes between the
            generation prompt and an answer, such as Qwen3's empty block of thinking. Marks that a
            model has to write there, such as the channel of gpt-oss, are then not learned either.
        packing: concatenate the sequences of a batch in one row without padding, separated by
            their positions. Gives the same update; a model whose attention does not support it
            raises an error.
        max_tokens_per_batch: sort rows by length into batches of at most so many tokens, padding
            included, instead of batches of per_device_train_batch_size rows. The seed determines
            the batches and their order, which changes with the epoch.
        dtype: weight type of a student loaded from a path: "float32", "bfloat16", "float16", or
            "auto" for the stored type. None is float32, because 16-bit weights lose updates
            smaller than half a step of the weight; with peft_config, None is "auto", because those
            weights do not change. bf16=True computes in bfloat16 with float32 weights.
        model_init_kwargs: arguments of from_pretrained for a student loaded from a path. On a CPU,
            attn_implementation is "eager" by default with bf16=True and a max_length of at most
            512, without packing.

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

    docs/training/arguments.md lists every field of TrainingArguments: unchanged, with another
    default, or unsupported.
    """

    # Fields that the command line accepts as JSON.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    k: int | None = 64
    support: str = "teacher"
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    eta: float = 3.0
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
    chat_template: str | None = None
    train_on_template_tokens: bool = True
    packing: bool = False
    max_tokens_per_batch: int | None = None
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
        checks.integer("k", self.k, 1, optional=True)
        checks.integer("max_length", self.max_length, 2, optional=True)
        checks.integer("max_tokens_per_batch", self.max_tokens_per_batch, 2, optional=True)
        checks.integer("max_new_tokens", self.max_new_tokens, 1)
        checks.choice("divergence", self.divergence, DIVERGENCES)
        checks.choice("tail", self.tail, TAILS)
        checks.choice("support", self.support, SUPPORTS)
        if self.k is None and self.support != "teacher":
            hint = "k=None compares the whole vocabulary"
            checks.fail("support", "'teacher' with k=None", repr(self.support), hint)
        checks.choice("backward", self.backward, ("auto", "fused", "recompute"))
        checks.choice("nonfinite", self.nonfinite, ("stop", "skip"))
        checks.choice("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto", None))
        if self.chat_template is not None:
            self.chat_template = str(self.chat_template)  # a Path is not saved
        options = self.model_init_kwargs
        if isinstance(options, str):  # from the command line
            options = parse_json(options, "model_init_kwargs", dict)
        if self.dtype is not None and {"dtype", "torch_dtype"} & set(options or {}):
            checks.fail("dtype", "None with a dtype in model_init_kwargs", repr(self.dtype))
        resolve_impl(self.impl)
        for name in ("beta", "skew", "ce_weight", "lmbda", "top_p"):
            checks.between(name, getattr(self, name), 0.0, 1.0)
        for name in ("z_loss", "eta"):
            checks.between(name, getattr(self, name), 0.0)
        for name in ("temperature", "sampling_temperature", "top_p"):
            checks.number(name, getattr(self, name))
            checks.positive(name, getattr(self, name))
        check_divergence(self.divergence, self.beta, self.skew, self.tail, self.allow_biased)
        if self.tail == "renorm_both" and self.k == 1:
            checks.fail(
                "tail",
                "a tail other than 'renorm_both' with k=1, where both distributions are the "
                "constant 1",
                repr(self.tail),
                "raise k, or use tail='bucket'",
            )
        if self.k is None and self.tail != "bucket":
            hint = "the whole vocabulary has no tail"
            checks.fail("tail", "'bucket' with k=None", repr(self.tail), hint)
        if self.lmbda == 1.0 and self.ce_weight:
            hint = "tokens that the student sampled cannot serve as labels"
            checks.fail("ce_weight", "0 with lmbda=1", f"{self.ce_weight:g}", hint)
        selection_of(self.token_selection)
        check_arguments(self)
        self.greater_is_better = direction_of(self)
        self.lr_scheduler_kwargs = schedule_options(self)
        scale_intervals(self)
        if self.use_cpu:
            self.dataloader_pin_memory = False
        super().__post_init__()
        check_device(self)
        if self.max_tokens_per_batch is not None:
            check_token_batches(self)
        if self.nonfinite == "skip" and (self.deepspeed or steps_in_backward(self)):
            checks.fail(
                "nonfinite",
                "'stop' with DeepSpeed, LOMO or a layerwise optimizer",
                "'skip'",
                "they update weights during the backward pass, before the gradient can be checked",
            )

    @property
    def selection(self) -> Selection | None:
        """The parsed `token_selection`, or None."""
        return selection_of(self.token_selection)

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = super().to_dict()
        return content | {"token_selection": _selection_text(self.token_selection)}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, where a caller's selection function becomes its name."""
        return self.__dict__ | {"token_selection": _selection_text(self.token_selection)}


def _selection_text(selection: Any) -> str | None:
    if callable(selection) and not hasattr(selection, "score"):
        return f"function {getattr(selection, '__qualname__', type(selection).__name__)}"
    return None if selection is None else str(selection)
