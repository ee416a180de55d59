"""One distillation: strategies applied in order around DistillTrainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from ...runtime.checks import fail
from ...teachers.local import Teacher
from ...training.config import DistillConfig
from ..audits.subject import Subject
from ..training_loop import InOrder, is_tiny, lora, order_by_length, train
from .lessons import Examples, PoolPrompt, sample_answers, to_row
from .strategy import DistillLoop, DistillSetup, RunState, Strategy, Training


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The result of one distillation.

    Attributes:
        examples: those of the last training. measured: results of `measure`, by step.
        contexts: prompt prefixes, by name, under which the student must also be evaluated.
    """

    student: Subject
    examples: Examples
    measured: dict[int, Any]
    notes: dict[str, Any]
    steps: int
    contexts: dict[str, str]


def distill(
    setup: DistillSetup,
    strategies: Sequence[Strategy],
    training: Training | None = None,
    *,
    seed: int = 0,
    measure: Callable[[Subject], Any] | None = None,
    measure_at: Sequence[float] = (),
) -> Distilled:
    """Distill `setup.teacher` into a copy of `setup.base`.

    Args:
        strategies: applied in this order.
        seed: for sampled answers, data order and random strategies. Students of two teachers with
            the same seed see the same prompts in the same order.
        measure: called with the student at the shares `measure_at` of its updates,
            0 < share < 1.

    Raises:
        ValueError: a strategy leaves no examples; an argument that a strategy or DistillTrainer
        rejects.
    """
    run = RunState(setup=setup, seed=seed)
    training = training or Training()
    pool: list[PoolPrompt] = list(setup.pool)
    for strategy in strategies:
        pool, training = strategy.pool(pool, run), strategy.training(training, run)
    run.training = training
    examples = sample_answers(
        pool,
        setup.generate or setup.teacher.generate,
        seed=seed,
        max_new_tokens=training.max_new_tokens,
        temperature=training.temperature,
    )
    _check_not_empty(examples, "the teacher's answers")
    run.sampled = examples
    for strategy in strategies:
        examples = strategy.transform_examples(examples, run)
        _check_not_empty(examples, strategy.name)
    measured: dict[int, Any] = {}

    def train_once(examples: Examples) -> Subject:
        measured.clear()
        run.examples = examples
        steps = {max(1, round(share * training.steps)) for share in measure_at} - {training.steps}
        callback = _MeasureCallback(run, steps, measure, measured)
        return _train(examples, strategies, training, run, callback)

    loop: DistillLoop = train_once
    for strategy in reversed(strategies):
        loop = strategy.wrap_loop(loop, run)
    student = loop(examples)
    contexts: dict[str, str] = {}
    for strategy in strategies:
        contexts |= strategy.contexts(run)
    return Distilled(
        student=student,
        examples=run.examples,
        measured=measured,
        notes=run.notes,
        steps=training.steps,
        contexts=contexts,
    )


def _check_not_empty(examples: Examples, source: str) -> None:
    if not examples:
        fail("strategies", "at least one example after each of them", f"none after {source}")


def _train(
    examples: Examples,
    strategies: Sequence[Strategy],
    training: Training,
    run: RunState,
    callback: _MeasureCallback,
) -> Subject:
    base = run.setup.base
    student = copy.deepcopy(base.model)
    # A copy: DistillTrainer freezes its teacher.
    original: Any = Teacher(copy.deepcopy(run.setup.teacher.model), tokenizer=base.tokenizer)
    teacher = original
    rank = training.lora_rank
    options: dict[str, Any] = {} if rank is None else {"peft_config": lora(rank, "student")}
    for strategy in strategies:
        teacher = strategy.teacher(teacher, student, run)
        options = strategy.options(options, run)
    if options.get("peft_config") is None and not getattr(student, "is_quantized", False):
        student.float()  # small updates vanish in 16 bits
    rows = [to_row(example, base) for example in examples]
    if teacher is original and not is_tiny(student):
        teacher = _stored_top_k(teacher, rows, training.settings, run) or teacher
    if not is_tiny(student):
        # By the prompt, which students of two teachers share, so that their order stays the same.
        lengths = [len(base.ids(example.input_prompt).ids) for example in examples]
        per_step = training.batch_size * training.settings.get("gradient_accumulation_steps", 1)
        n = training.steps * per_step
        rows = [rows[i] for i in order_by_length(lengths, n, training.batch_size, run.seed)]
        options["trainer"] = InOrder
    trained = train(
        student,
        teacher,
        rows,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup=20,
        settings={
            "logging_strategy": "no",
            # Strategies may produce targets that the validity checks reject.
            "check_signal": False,
            "check_data": False,  # rows of token ids, which this module made
            "seed": run.seed,
            **({"ce_weight": 1.0} if teacher is None else {}),
            **training.settings,
        },
        processing_class=base.tokenizer,
        callbacks=[callback],
        **options,
    )
    return base.with_model(trained, "student")


def _stored_top_k(
    teacher: Teacher, rows: list[dict[str, list[int]]], settings: Mapping[str, Any], run: RunState
) -> Any:
    """Return a cache with the answers to these rows; None where these settings need the teacher."""
    store = run.setup.top_k
    k, temperature, lmbda = (
        settings.get(name, getattr(DistillConfig, name)) for name in ("k", "temperature", "lmbda")
    )
    if store is None or lmbda or k is None or k > store.k or temperature not in store.temperatures:
        return None
    sampled = [to_row(example, run.setup.base) for example in run.sampled]
    known = {tuple(row["input_ids"]) for row in sampled}
    if any(tuple(row["input_ids"]) not in known for row in rows):
        return None  # a strategy changed answers
    return store(teacher, sampled)


@dataclass(eq=False)
class _MeasureCallback(TrainerCallback):
    """Measures the student during training."""

    run: RunState
    steps: set[int]
    measure: Callable[[Subject], Any] | None
    measured: dict[int, Any]
    subject: Subject | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.subject = self.run.setup.base.with_model(model, "student")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.measure is not None and state.global_step in self.steps:
            assert self.subject is not None
            self.measured[state.global_step] = self.measure(self.subject)
