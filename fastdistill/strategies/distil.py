"""One distillation: strategies in a row, driven by DistillTrainer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, get_scheduler

from ..adapters import merge_adapter
from ..audits.subject import Subject
from ..backend import one_thread
from ..teacher import Teacher
from ..training.config import DistillConfig
from ..training.trainer import DistillTrainer
from .lessons import Asked, Lesson, answered, row_of
from .strategy import Distil, Run, Scene, Strategy, Training


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A student, what it was taught, what was measured on the way, and what strategies noted."""

    student: Subject
    lessons: list[Lesson]
    measured: dict[int, Any]  # by step
    notes: dict[str, Any]
    steps: int
    contexts: dict[str, str]  # words in front of prompts in which it has to be read as well


def distil(
    scene: Scene,
    strategies: Sequence[Strategy],
    training: Training | None = None,
    *,
    seed: int = 0,
    measure: Callable[[Subject], Any] | None = None,
    at: Sequence[float] = (),
) -> Distilled:
    """Distil `scene.teacher` into a copy of `scene.base`.

    Args:
        strategies: applied in this order.
        seed: of the answers, of the order of the data and of whatever strategies draw. Students of
            two teachers with the same seed are asked and shown the same prompts in the same order.
        measure: of the student on the way, `at` these shares of its updates, 0 < share < 1.

    Raises:
        ValueError: no lesson is left, by the name of the strategy; whatever a strategy refuses, or
        DistillTrainer of the settings.
    """
    run = Run(scene=scene, seed=seed)
    training = training or Training()
    pool: list[Asked] = list(scene.pool)
    for strategy in strategies:
        pool, training = strategy.pool(pool, run), strategy.training(training, run)
    run.training = training
    lessons = answered(
        pool,
        scene.teacher,
        seed=seed,
        max_new_tokens=training.max_new_tokens,
        temperature=training.temperature,
    )
    _refuse_none(lessons, "the teacher's answers")
    for strategy in strategies:
        lessons = strategy.lessons(lessons, run)
        _refuse_none(lessons, strategy.name)
    measured: dict[int, Any] = {}

    def once(lessons: list[Lesson]) -> Subject:
        measured.clear()
        run.taught = lessons
        steps = {max(1, round(share * training.steps)) for share in at} - {training.steps}
        measuring = _Measuring(run, steps, measure, measured)
        return _trained(lessons, strategies, training, run, measuring)

    loop: Distil = once
    for strategy in reversed(strategies):
        loop = strategy.around(loop, run)
    student = loop(lessons)
    contexts: dict[str, str] = {}
    for strategy in strategies:
        contexts |= strategy.contexts(run)
    return Distilled(
        student=student,
        lessons=run.taught,
        measured=measured,
        notes=run.notes,
        steps=training.steps,
        contexts=contexts,
    )


def _refuse_none(lessons: list[Lesson], left_by: str) -> None:
    if not lessons:
        raise ValueError(
            f"strategies: expected them to leave a lesson or more, got none left by {left_by}"
        )


def _trained(
    lessons: list[Lesson],
    strategies: Sequence[Strategy],
    training: Training,
    run: Run,
    measuring: _Measuring,
) -> Subject:
    base = run.scene.base
    student = copy.deepcopy(base.model)
    # A copy: admitting a teacher freezes it.
    teacher: Any = Teacher(copy.deepcopy(run.scene.teacher.model), tokenizer=base.tokenizer)
    options: dict[str, Any] = {}
    for strategy in strategies:
        teacher = strategy.teacher(teacher, student, run)
        options = strategy.options(options, run)
    if options.get("peft_config") is None and not getattr(student, "is_quantized", False):
        student.float()  # as a student from a path: small updates vanish in 16 bits
    settings = {"ce_weight": 1.0} if teacher is None else {}
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as folder, one_thread():
        args = DistillConfig(
            folder,
            **{
                "max_steps": training.steps,
                "per_device_train_batch_size": training.batch_size,
                "learning_rate": training.learning_rate,
                "use_cpu": not torch.cuda.is_available(),
                "save_strategy": "no",
                "logging_strategy": "no",
                "disable_tqdm": True,
                "report_to": [],
                "show_panel": False,
                # A strategy may make answers of which the checks would say that they are wrong.
                "check_signal": False,
                "seed": run.seed,
                **settings,
                **training.settings,
            },
        )
        trainer = options.pop("trainer", DistillTrainer)(
            student,
            teacher,
            args,
            train_dataset=[row_of(lesson, base) for lesson in lessons],
            processing_class=base.tokenizer,
            callbacks=[measuring],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        measuring.subject = base.with_model(trainer.model, "student")
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = torch.optim.AdamW(
            weights, lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        trainer.lr_scheduler = get_scheduler(
            "cosine",
            trainer.optimizer,
            num_warmup_steps=min(20, training.steps // 4),
            num_training_steps=training.steps,
        )
        trainer.train()
        trained: Any = trainer.model
    if hasattr(trained, "merge_and_unload"):
        trained = merge_adapter(trained)
    return base.with_model(trained.eval(), "student")


class _Measuring(TrainerCallback):
    """Says how far a run is, and measures the student on the way."""

    def __init__(
        self,
        run: Run,
        at: set[int],
        measure: Callable[[Subject], Any] | None,
        measured: dict[int, Any],
    ) -> None:
        self.run, self.at, self.measure, self.measured = run, at, measure, measured
        self.subject: Subject | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.progress = state.global_step / max(state.max_steps, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.measure is not None and state.global_step in self.at:
            assert self.subject is not None
            self.measured[state.global_step] = self.measure(self.subject)
