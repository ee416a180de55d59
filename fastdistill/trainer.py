"""DistillTrainer: transformers.Trainer, with the loss taken where hidden states meet the head.

One update is the gradient of (Σ over all target tokens of the accumulated batch) / (their number),
whatever the gradient accumulation and the number of processes. The Trainer's own normalisation is
switched off, since it either divides a second time or averages ragged batches unequally.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback

from .config import DistillConfig
from .data import DistillCollator
from .fingerprint import refuse_different_tokenizers
from .heads import LMHead, at_head, head_of, verify_head
from .objective import EVAL_COLUMNS, Objective, measure, objective
from .outputs import TopK
from .panel import Panel, first_batch
from .teacher import Teacher, TopKTeacher

logger = logging.getLogger(__name__)

_UNPROVED = (
    " Pass processing_class and the teacher's tokenizer to have it proved that they share a "
    "vocabulary."
)

Examples = Dataset | list[dict[str, Any]]


class DistillTrainer(Trainer):
    """Train `model` on the top k of `teacher`, or on the labels alone.

    Args:
        model: the student, a Hugging Face causal LM with a plain (unadapted) output head.
        teacher: a model, the path of one, or any object with topk(...) (see TopKTeacher). None
            trains on the labels alone, through the same code, and needs ce_weight=1.0.
        args: a DistillConfig.
        train_dataset, eval_dataset: any torch Dataset or list of dicts with input_ids, and
            optionally labels (−100 where a token is no target) and attention_mask.
        processing_class: the student's tokenizer; with the teacher's it proves that both mean the
            same by an id.
        callbacks: as in transformers.Trainer.

    `evaluate` gives loss, nll, perplexity and top1 (accuracy), and with a teacher kl (bucket tail),
    agreement (share of positions where both rank the same token first), teacher_mass and
    student_mass; all are means over target tokens, and no logits are gathered. `predict` gives the
    sums behind them, one row of EVAL_COLUMNS per sequence.
    """

    loss_is_scaled_for_ga = True  # read by transformers >= 5.19

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: TopKTeacher | PreTrainedModel | str | Path | None = None,
        args: DistillConfig | None = None,
        *,
        train_dataset: Examples | None = None,
        eval_dataset: Examples | dict[str, Examples] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = DistillConfig("trainer_output") if args is None else args
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args: expected a DistillConfig, got {type(args).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a causal language model, got {type(model).__name__}")
        if teacher is model:
            raise ValueError("teacher: expected another model, got the student itself")
        if teacher is None and args.ce_weight != 1.0:
            raise ValueError(
                f"teacher: expected one, got None with ce_weight={args.ce_weight:g}. Pass a "
                "teacher, or ce_weight=1.0 to train on the labels alone"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU per process, got {args.n_gpu} in this one. Start with "
                "`torchrun --nproc-per-node=N`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            raise ValueError(
                "model: expected config.output_router_logits=False, got True: the router's loss "
                "would be dropped, since the loss is taken at the output head"
            )
        head_of(model)  # an adapted or quantised head is refused before anything is built
        super().__init__(
            model=model,
            args=args,
            data_collator=DistillCollator(pad_id=_pad_id(processing_class)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=_summarise,
            compute_loss_func=_never_called,
        )
        verify_head(self.model)
        # With a compute_loss_func and without loss kwargs, every version from 5.0 counts the
        # targets of the accumulated batch, hands the number over, and divides by nothing itself.
        self.model_accepts_loss_kwargs = False
        self.panel: Panel | None = None
        self._valid_vocab: int | None = None
        self._since_log: dict[str, Tensor] = {}
        self.teacher = None if teacher is None else self._admit(teacher)

    def _admit(self, teacher: TopKTeacher | PreTrainedModel | str | Path) -> TopKTeacher:
        """Load, place and compare: what can be refused is refused before the first step."""
        loadable = isinstance(teacher, (nn.Module, str, Path))
        if loadable and not isinstance(teacher, TopKTeacher):
            teacher = Teacher(teacher, impl=self.args.impl)
        if not isinstance(teacher, TopKTeacher):
            raise TypeError(
                "teacher: expected a model, a path, or an object with topk(input_ids, "
                f"attention_mask, *, k, temperature), got {type(teacher).__name__}"
            )
        theirs = getattr(teacher, "tokenizer", None)
        compared = self.processing_class is not None and theirs is not None
        if compared:
            refuse_different_tokenizers(self.processing_class, theirs)
        ours = head_of(self.model).weight.shape[0]
        vocab = getattr(teacher, "vocab_size", ours)
        if vocab != ours:
            self._valid_vocab = min(vocab, ours)
            logger.warning(
                "The student's head has %d rows and the teacher's %d: both are cut to the first "
                "%d, the others count as padding.%s",
                *(ours, vocab, self._valid_vocab, "" if compared else _UNPROVED),
            )
        if self.args.k > min(vocab, ours):
            raise ValueError(
                f"k: expected at most the vocabulary's {min(vocab, ours)} tokens, got {self.args.k}"
            )
        if isinstance(teacher, Teacher):
            if teacher.model is self.model:
                raise ValueError("teacher: expected another model, got the student itself")
            teacher.valid_vocab = self._valid_vocab
            if not hasattr(teacher.model, "hf_device_map"):
                teacher.to(self.args.device)
        return teacher

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result: Objective = self._at_head(model, inputs, self._objective)
        if num_items_in_batch is None:
            loss = result.loss / result.tokens.clamp(min=1)
        else:
            loss = result.loss / _at_least_one(num_items_in_batch)
            if self.args.average_tokens_across_devices:
                # The count is over all processes, and their gradients are about to be averaged.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {}) if return_outputs else loss

    def _at_head(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        use: Callable[[Tensor, LMHead, Tensor, TopK | None], Any],
    ) -> Any:
        """use(hidden, head, labels, teacher), aligned, inside the student's forward."""
        if "labels" not in inputs:
            raise ValueError(
                "inputs: expected labels in every batch, as DistillCollator makes them"
            )
        labels = inputs["labels"][:, 1:]
        answers = None
        if self.teacher is not None:
            answers = _before_last(
                self.teacher.topk(
                    inputs["input_ids"],
                    inputs.get("attention_mask"),
                    k=self.args.k,
                    temperature=self.args.temperature,
                )
            ).to(labels.device)
        # DDP and FSDP wrap the model that is called; the hooks belong on the one inside.
        student = self.accelerator.unwrap_model(model)

        def with_hidden(hidden: Tensor) -> Any:
            head = replace(head_of(student), valid_vocab=self._valid_vocab)
            if self.model.training and self.panel is None and answers is not None:
                self._first_batch(hidden[:, :-1], head, labels, answers, inputs)
            return use(hidden[:, :-1], head, labels, answers)

        forwarded = {name: value for name, value in inputs.items() if name != "labels"}
        with at_head(student, with_hidden):
            return model(**forwarded, use_cache=False)

    def _objective(
        self, hidden: Tensor, head: LMHead, labels: Tensor, answers: TopK | None
    ) -> Objective:
        result = objective(hidden, head, labels, answers, self.args)
        if self.model.training:
            for name, value in {"tokens": result.tokens, **result.sums}.items():
                self._since_log[name] = self._since_log.get(name, 0) + value
        return result

    def _first_batch(
        self, hidden: Tensor, head: LMHead, labels: Tensor, answers: TopK, inputs: dict[str, Any]
    ) -> None:
        if not (labels >= 0).any():
            return
        attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, 1:]
        self.panel = first_batch(
            *(hidden, head, labels, answers, attended.bool(), self.args),
            aligned_by_construction=isinstance(self.teacher, Teacher),
        )
        if self.args.show_panel and self.is_world_process_zero():
            self.panel.show()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._since_log:
            sums = self.accelerator.reduce(self._since_log, reduction="sum")
            tokens = sums.pop("tokens").clamp(min=1)
            logs |= {name: (value / tokens).item() for name, value in sums.items()}
            self._since_log = {}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of each sequence in place of logits: gathered and counted exactly, and tiny."""
        inputs = self._prepare_inputs(inputs)

        def sums(hidden: Tensor, head: LMHead, labels: Tensor, answers: TopK | None) -> Tensor:
            return measure(hidden, head, labels, answers, self.args)

        with torch.no_grad(), self.compute_loss_context_manager():
            rows = self._at_head(model, inputs, sums)
        return None, rows, rows[:, :1]


def _summarise(prediction: EvalPrediction) -> dict[str, float]:
    rows = prediction.predictions
    rows = np.concatenate(rows) if isinstance(rows, (list, tuple)) else rows
    totals = dict(zip(EVAL_COLUMNS, rows.sum(0, dtype=np.float64), strict=True))
    tokens = max(totals.pop("tokens"), 1.0)
    metrics = {name: float(v / tokens) for name, v in totals.items() if not math.isnan(v)}
    metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return metrics


def _before_last(answers: TopK) -> TopK:
    tail = None if answers.log_tail is None else answers.log_tail[:, :-1]
    return TopK(answers.ids[:, :-1], answers.logprobs[:, :-1], tail, answers.temperature)


def _at_least_one(count: Tensor | int) -> Tensor | int:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _pad_id(processing_class: Any) -> int:
    pad_id = getattr(processing_class, "pad_token_id", None)
    return 0 if pad_id is None else pad_id


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("compute_loss is overridden; this only makes the Trainer count targets")
