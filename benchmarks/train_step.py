"""A whole training step of a student: forward, loss, backward, AdamW; 4 rows of 512 tokens.

A Llama of H=512 with tied embeddings and Qwen's vocabulary, random weights (time and memory do not
depend on them), in fp32. Two comparisons, each of the same step in turns:

    existing top-64 answers                  transformers' Trainer on materialized logits; ours,
                                             with the loss fused and recomputed
    a teacher of the same size in process    TRL's GKDTrainer; ours over the whole vocabulary (the
                                             same loss); ours on the teacher's top 64

peak_mb is the memory that a step adds, including gradients; output_mb is the memory before it:
weights, AdamW's moments, and the teacher if there is one. grad_error is the distance of the
gradient from that of the first contender with the same loss, whose products round in another order;
more than MOST_ERROR is rejected.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import fastdistill as fd
from fastdistill.teachers.local import Teacher

from .data import device
from .large_models import small_llama
from .memory import peak_mb
from .peers import named
from .registry import GateError, attempt
from .rows import Row
from .rows import table as table
from .run import take_turns
from .shapes import Shape

SHAPE = Shape(N=2048, H=512, V=151936, K=64)
ROW = 512
LAYERS = 4
TURNS = 5
MOST_ERROR = 1e-3


class TrainStep(NamedTuple):
    """A repeatable step, its gradient, and the modules that it needs."""

    step: Callable[[], object]
    gradient: Callable[[], Tensor]
    holds: list[nn.Module]


def _llama(shape: Shape, seed: int) -> LlamaForCausalLM:
    return small_llama(shape, LAYERS, 2 * ROW, seed)


def _batch(shape: Shape) -> dict[str, Tensor]:
    rows = max(1, shape.N // ROW)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.V, (rows, shape.N // rows), generator=g).to(device())
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class StoredTeacher:
    """A teacher that returns stored answers."""

    def __init__(self, answers: fd.TopK | None, vocab: int) -> None:
        self.answers, self.vocab_size = answers, vocab

    def topk(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> fd.TopK:
        assert self.answers is not None
        return self.answers


class _Materialized(Trainer):
    """The loss without a fused kernel: log-softmax of all logits, compared on K of them."""

    answers: fd.TopK
    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits[:, :-1]
        answers = self.answers.map(lambda tensor: tensor[:, :-1])
        ids, logp, log_tail = answers.ids, answers.logprobs, answers.log_tail
        assert log_tail is not None
        logq = logits.float().log_softmax(-1).gather(-1, ids)
        tail_q = torch.log1p(-logq.exp().sum(-1).clamp(max=1 - 2**-24))
        kl = (logp.exp() * (logp - logq)).sum(-1) + log_tail.exp() * (log_tail - tail_q)
        return kl.sum() / num_items_in_batch


def settings(kind: Any, folder: str, **options: Any) -> Any:
    shared = {
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "max_steps": 1,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return kind(folder, **(shared | options))


def _train_step(trainer: Any, batch: dict[str, Tensor], *more: nn.Module) -> TrainStep:
    """Forward, backward and update, as the trainer performs them."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    count = (batch["labels"][:, 1:] != -100).sum()
    model = trainer.model.train()

    def backward() -> None:
        trainer.training_step(model, dict(batch), count)

    def step() -> None:
        backward()
        trainer.optimizer.step()
        model.zero_grad()

    def gradient() -> Tensor:
        backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return gradients

    return TrainStep(step, gradient, [model, *more])


def _ours(shape: Shape, folder: str, teacher: Any, **options: Any) -> Any:
    args = settings(fd.DistillConfig, folder, show_panel=False, check_signal=False, **options)
    return fd.DistillTrainer(_llama(shape, 0), teacher, args)


def _with_answers(shape: Shape, folder: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        answers = Teacher(_llama(shape, 7)).topk(batch["input_ids"], k=shape.K)

    def materialized() -> TrainStep:
        trainer = _Materialized(_llama(shape, 0), settings(TrainingArguments, folder))
        trainer.answers = answers
        return _train_step(trainer, batch)

    def ours(**options: Any) -> Callable[[], TrainStep]:
        known = StoredTeacher(answers, shape.V)
        return lambda: _train_step(_ours(shape, folder, known, k=shape.K, **options), batch)

    return {
        "materialised": materialized,
        "ours": ours(),
        "ours, recompute": ours(backward="recompute"),
    }


def _with_teacher(shape: Shape, folder: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    def trl() -> TrainStep:
        teacher = _llama(shape, 7)
        trainer = gkd_trainer(_llama(shape, 0), teacher, folder, gradient_checkpointing=False)
        return _train_step(trainer, batch, teacher)

    def ours(k: int | None) -> Callable[[], TrainStep]:
        def make() -> TrainStep:
            teacher = Teacher(_llama(shape, 7))
            return _train_step(_ours(shape, folder, teacher, k=k), batch, teacher.model)

        return make

    return {"TRL GKDTrainer": trl, "ours": ours(None), "ours, top 64": ours(shape.K)}


def gkd_trainer(student: Any, teacher: Any, folder: str, **options: Any) -> Any:
    """TRL's GKDTrainer with the forward KL on given text."""
    config, trainer = (
        named("trl", "trl.experimental.gkd", name) for name in ("GKDConfig", "GKDTrainer")
    )
    from datasets import Dataset

    from fastdistill.alignment.experiment.demo.models import shipped_teacher

    tokenizer = shipped_teacher()[1]
    tokenizer.pad_token = tokenizer.eos_token
    args = settings(config, folder, lmbda=0.0, beta=0.0, **options)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return trainer(
        student,
        teacher,
        args,
        train_dataset=Dataset.from_list([{"messages": talk}]),
        processing_class=tokenizer,
    )


CASES = {"train_step": _with_answers, "train_step_teacher": _with_teacher}
SAME_LOSS = {"materialised", "TRL GKDTrainer", "ours", "ours, recompute"}


def _memory_mb(student: nn.Module, *others: nn.Module) -> float:
    """MB of all weights, and of AdamW's two moments of the student's."""
    moments = 2 * sum(p.nbytes for p in student.parameters() if p.requires_grad)
    return (moments + sum(p.nbytes for m in (student, *others) for p in m.parameters())) / 1e6


def rows(shape: Shape = SHAPE) -> list[Row]:
    """Measure; a `shape` smaller than SHAPE runs one turn, for a test run."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for op, case in CASES.items():
            results += _measure(op, case(shape, folder, _batch(shape)), shape)
            gc.collect()
    return results


def _measure(op: str, contenders: dict[str, Callable[[], TrainStep]], shape: Shape) -> list[Row]:
    rows: list[Row] = []
    works: dict[str, Callable[[], object]] = {}
    truth: Tensor | None = None
    for name, make in contenders.items():
        row = Row.at(shape, op, name, "both", "float32")
        rows.append(row)
        work, reason = attempt(make)
        row.set_reason(reason)
        if work is None:
            continue
        if name in SAME_LOSS:
            gradient = work.gradient()
            truth = gradient if truth is None else truth
            row.grad_error = float((gradient - truth).norm() / truth.norm())
            if row.grad_error > MOST_ERROR:
                raise GateError(f"{op}: the gradient of {name} is {row.grad_error:.1e} off")
            del gradient
        work.step()  # allocates AdamW's moments
        row.output_mb = _memory_mb(*work.holds)
        row.peak_mb = peak_mb(work.step)
        works[name] = work.step
    take_turns(rows, works, TURNS if shape == SHAPE else 1)
    return rows
