"""One student: its training by DistillTrainer, and measurements on held-out rows on the way."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from .....hf.collator import DistillCollator
from .....hf.generation import ends_of, generate_rows
from .....hf.lm_head import evaluating, head_of
from .....losses.scores import token_scores
from .....teachers.cache import TeacherCache
from .....teachers.local import Teacher
from .....training.config import DistillConfig
from .....training.targets import targets_of
from .....training.trainer import DistillTrainer
from ...cached_run import CachedRun
from .models import first_student
from .rows import ANSWER, WINDOW, Row, Rows, likeliest, prompt_row, with_hard_labels, with_prompt

K = 64
BATCH = 4  # rows
PROMPT = WINDOW - ANSWER  # tokens of a text that an on-policy student continues
SAMPLE_TOKENS = 48
EVAL_ROWS = 8  # in a batch


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train a student.

    Attributes:
        options: of DistillConfig.
        teacher: "cache" of its answers, the "model" itself, or "none".
        hard_labels: targets are the teacher's likeliest tokens instead of the text.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = "cache"
    hard_labels: bool = False
    learning_rate: float = 5e-4  # the best of `python -m benchmarks.real_model` after 16 steps

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"options": dict(self.options)}


TOP_K = Arm(name="top-k KL", options={"k": K})
LABELS = Arm(name="labels", options={"ce_weight": 1.0}, teacher="none")


class Setting(NamedTuple):
    """What all students share."""

    file: Path  # of the teacher
    teacher: Teacher
    rows: Rows
    cache: TeacherCache  # of the rows to train on
    held_out_cache: TeacherCache
    bf16: bool

    @property
    def digest(self) -> str:
        """The sha256 of all rows."""
        held_out = (row for rows in self.rows.held_out.values() for row in rows)
        content = hashlib.sha256()
        for row in (*self.rows.train, *held_out):
            content.update(row["input_ids"].numpy().tobytes() + row["labels"].numpy().tobytes())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StudentRun(CachedRun):
    """The training of one student; the seed is that of the order of the rows.

    Attributes:
        points: steps after which the student is measured; the last step always is.
        keep: a folder for the trained student, or None.
    """

    keys: ClassVar[tuple[str, ...]] = ("points", "cpu_seconds_per_step", "samples")

    setting: Setting
    arm: Arm
    seed: int
    steps: int
    points: tuple[int, ...] = ()
    keep: Path | None = None
    callbacks: tuple[TrainerCallback, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "arm": self.arm.as_json(),
            "seed": self.seed,
            "steps": self.steps,
            "points": sorted({*self.points, self.steps}),
            "batch": BATCH,
            "bf16": self.setting.bf16,
            "rows": self.setting.digest,
        }

    def compute(self, folder: Path) -> dict[str, Any]:
        student = first_student(self.setting.file)
        watch = Watch(self.setting, frozenset({*self.points, self.steps}))
        train(student, self, folder, watch)
        if self.keep is not None:
            student.save_pretrained(self.keep)
            self.setting.teacher.tokenizer.save_pretrained(self.keep)
        steps = watch.step_seconds[1:] or watch.step_seconds
        return {
            "points": watch.measured,
            "cpu_seconds_per_step": sum(steps) / len(steps),
            "step_seconds": [round(x, 3) for x in watch.step_seconds],
            "samples": samples(student, self.setting),
        }


class Watch(TrainerCallback):
    """Measures the student after some steps, and the CPU time of each step without that."""

    def __init__(self, setting: Setting, points: frozenset[int]) -> None:
        self.setting, self.points = setting, points
        self.measured: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.process_time() - self._last)
        if state.global_step in self.points:
            figures = measure(kwargs["model"], self.setting)
            self.measured.append({"step": state.global_step, **figures})
        self._last = time.process_time()


def train(student: PreTrainedModel, run: StudentRun, folder: Path, watch: Watch) -> None:
    """Train a student in place, at a constant learning rate after a warmup."""
    setting, arm = run.setting, run.arm
    teachers = {"cache": setting.cache, "model": setting.teacher, "none": None}
    trainer = DistillTrainer(
        student,
        teachers[arm.teacher],
        DistillConfig(
            str(folder / "trainer"),
            max_steps=run.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=arm.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, run.steps // 10),
            adam_beta2=0.95,
            seed=run.seed,
            bf16=setting.bf16,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            show_panel=False,
            **arm.options,
        ),
        train_dataset=training_rows(setting, arm),
        processing_class=setting.teacher.tokenizer,
        callbacks=[watch, *run.callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def training_rows(setting: Setting, arm: Arm) -> list[Row]:
    if arm.hard_labels:
        return [with_hard_labels(row, setting.cache) for row in setting.rows.train]
    if arm.options.get("lmbda"):
        is_text = [bool((row["labels"] == row["input_ids"]).all()) for row in setting.rows.train]
        return [
            with_prompt(row, PROMPT) if text else row
            for row, text in zip(setting.rows.train, is_text, strict=True)
        ]
    return setting.rows.train


def measure(student: PreTrainedModel, setting: Setting) -> dict[str, dict[str, float]]:
    """Return means over the held-out targets of each kind of text, against the teacher's top k."""
    return {
        kind: measure_rows(student, rows, setting) for kind, rows in setting.rows.held_out.items()
    }


@torch.no_grad()
def measure_rows(student: PreTrainedModel, rows: list[Row], setting: Setting) -> dict[str, float]:
    """Return nll, kl (to the teacher), agreement and top1 in nats and shares per target."""
    collate, head = DistillCollator(pad_id=setting.teacher.tokenizer.pad_token_id), head_of(student)
    totals = dict.fromkeys(("tokens", "nll", "kl", "agreement", "top1"), 0.0)
    for i in range(0, len(rows), EVAL_ROWS):
        batch = collate(rows[i : i + EVAL_ROWS])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with evaluating(student), torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
            hidden = student.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        targets = targets_of(batch)
        teacher = targets.gather_topk(setting.held_out_cache.topk(ids, mask, k=K))
        scores = token_scores(
            targets.gather(hidden).to(head.weight.dtype),
            head.weight,
            labels=targets.labels,
            teacher=teacher,
            **head.options(),
        )
        assert scores.nll is not None
        assert scores.label_rank is not None
        assert scores.forward_kl is not None
        agrees, right = scores.argmax == likeliest(teacher), scores.label_rank == 0
        totals["tokens"] += len(targets.labels)
        for name, values in (
            ("nll", scores.nll),
            ("kl", scores.forward_kl),
            ("agreement", agrees),
            ("top1", right),
        ):
            totals[name] += float(values.double().sum())
    tokens = totals["tokens"]
    return {name: value if name == "tokens" else value / tokens for name, value in totals.items()}


def samples(model: PreTrainedModel, setting: Setting, n: int = 4) -> dict[str, str]:
    """Return a greedy answer to each of the first n held-out prompts."""
    tokenizer, prompts = setting.teacher.tokenizer, setting.rows.prompts[:n]
    new = generate_rows(
        model,
        [prompt_row(tokenizer, prompt)["input_ids"].tolist() for prompt in prompts],
        max_new_tokens=SAMPLE_TOKENS,
        pad_id=tokenizer.pad_token_id,
        ends=ends_of(model, tokenizer),
        device=torch.device("cpu"),
    )
    texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new)
    return dict(zip(prompts, texts, strict=True))
