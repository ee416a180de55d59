"""`fastdistill train`."""

from __future__ import annotations

import math
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments

from ..hf.encoder import Encoder
from ..hf.open_dataset import open_dataset
from ..hf.source import model_source, source_of
from ..hf.tokenizers import with_chat_template
from ..report.run.page import write_run_report
from ..report.run.series import has_diverged
from ..runtime.checks import integer
from ..runtime.optional import require
from ..runtime.printable import printable
from ..teachers.http import ServedTeacher
from ..teachers.local import load_teacher
from ..training.arguments import check_metric, check_sampling
from ..training.cached_answers import check_cache_covers
from ..training.checkpoints import check_named_checkpoint, last_finished
from ..training.checks.dataset import Lengths, check_datasets, datasets_by_name
from ..training.checks.lengths import check_lengths, row_limits
from ..training.config import DistillConfig
from ..training.logs.metrics import format_short
from ..training.logs.run_files import read_run
from ..training.progress import TrainingProgress
from ..training.student import prepare_loaded
from ..training.teacher_setup import check_fit
from ..training.token_batches import token_batches
from ..training.trainer import DistillTrainer
from .loaders import (
    as_exit_code_1,
    open_tokenizer,
    outline_model,
    outline_teacher,
)
from .printing import say
from .settings import coerce
from .verbs import Train


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a run, which may have been finished before."""

    out: str
    report: str
    steps: int
    already_done: bool
    loss: float | None
    diverged: bool
    evaluation: dict[str, Any]
    seconds: float

    as_json = asdict

    def to_lines(self) -> list[str]:
        figures = "  ".join(
            f"{name} {format_short(self.evaluation[name])}"
            for name in ("kl", "agreement", "perplexity")
            if self.evaluation.get(name) is not None
        )
        loss = "none" if self.loss is None else format_short(self.loss)
        summary = f"{self.steps:,} steps, mean loss {loss}, {self.seconds:.0f} s."
        if self.already_done:
            summary = f"Already finished at step {self.steps:,}; nothing was trained."
        evaluation = [f"Evaluation: {figures}"] if figures else []
        alarm = ["The loss rose: the run diverged. Lower the learning rate."]
        return [
            summary,
            *evaluation,
            f"Student: {self.out}. Report: {self.report}",
            *(alarm if self.diverged else []),
        ]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of a dry run; `cut` and `without_targets` by dataset."""

    dry_run: bool = True
    examples: int
    tokens: int
    targets: int
    longest: int
    cut: dict[str, str]
    without_targets: dict[str, int]
    steps: int

    as_json = asdict

    def to_lines(self) -> list[str]:
        return [
            f"{self.examples:,} examples, {self.tokens:,} tokens "
            f"({self.targets:,} targets), {self.steps:,} steps.",
            *(f"{name}: {cut}." for name, cut in self.cut.items()),
            *(
                f"{name}: {n:,} examples have no target."
                for name, n in self.without_targets.items()
            ),
            "All checks passed. `fastdistill plan` estimates the memory.",
        ]


def extra_keys() -> list[str]:
    """Return the fields of DistillConfig that KEY=VALUE accepts; --out sets output_dir."""
    names = [field.name for field in fields(DistillConfig) if field.init]
    return [name for name in names if name != "output_dir"]


def resolved_settings(options: Train, extra: dict[str, Any]) -> dict[str, Any]:
    """Return our settings, and those of TrainingArguments that the user set."""
    config = _config(options, extra)
    theirs = {field.name for field in fields(TrainingArguments)}
    own_settings = {name: getattr(config, name) for name in extra_keys() if name not in theirs}
    return vars(options) | own_settings | _coerced(extra)


def run(options: Train, extra: dict[str, Any]) -> Trained | None:
    config, (data, held_out) = _config(options, extra), _load_data(options)
    tokenizer = open_tokenizer(options.tokenizer or options.student)
    teacher = None
    if options.teacher is not None:
        teacher = load_teacher(
            options.teacher,
            quant=options.teacher_quant,
            compute=options.teacher_compute,
            device=config.device,
        )
    trainer = DistillTrainer(
        options.student,
        teacher,
        config,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=_adapters(options.lora_rank),
        callbacks=[TrainingProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.check_savable()
    start = time.perf_counter()
    if trainer.is_world_process_zero():
        print(_resume_note(options, config), file=sys.stderr)
    resume = config.resume_from_checkpoint or ("auto" if options.resume else None)
    with (
        as_exit_code_1("train: stopped"),
        _report_nonfinite(options, trainer),
        _report_interruption(options),
    ):
        outcome = trainer.train(resume_from_checkpoint=resume)
        evaluated = (
            _recorded_evaluation(options, outcome.global_step) if trainer.already_done else None
        )
        report: Path | None = Path(options.out, "report.html")
        if evaluated is None:
            trainer.save_model()
            evaluated = {} if held_out is None else _last_evaluation(trainer) or trainer.evaluate()
            report = write_run_report(options.out) if trainer.is_world_process_zero() else None
    if report is None:
        return None
    return Trained(
        out=str(options.out),
        report=str(report),
        steps=outcome.global_step,
        already_done=trainer.already_done,
        loss=outcome.training_loss if math.isfinite(outcome.training_loss) else None,
        diverged=has_diverged(read_run(options.out)),
        evaluation={name.removeprefix("eval_"): value for name, value in evaluated.items()},
        seconds=time.perf_counter() - start,
    )


def _resume_note(options: Train, config: DistillConfig) -> str:
    """Return the line printed before a run: where its checkpoints go and how to resume."""
    strategy = str(config.save_strategy.value)
    if strategy == "no":
        return "train: save_strategy=no: a stopped run leaves no checkpoint and cannot be resumed."
    if config.save_only_model:
        return (
            "train: save_only_model=true: a stopped run leaves weights only and cannot be resumed."
        )
    on_signal = config.save_on_interrupt and config.world_size == 1
    signals = ", also on Ctrl-C and SIGTERM" if on_signal else ""
    resume = "re-run the same command to resume" if options.resume else "--resume resumes"
    return f"train: checkpoints are written to {printable(options.out)}{signals}; {resume}."


@contextmanager
def _report_interruption(options: Train) -> Iterator[None]:
    """Print on Ctrl-C which checkpoint the next run resumes from."""
    try:
        yield
    except KeyboardInterrupt as error:
        checkpoint = last_finished(options.out)
        message = (
            f"Re-run the same command to resume from {checkpoint.name}."
            if checkpoint is not None and options.resume
            else "There is no checkpoint to resume from: the next run starts at the first step."
        )
        print(f"fastdistill: train: {error or 'Stopped.'} {message}", file=sys.stderr)
        raise


@contextmanager
def _report_nonfinite(options: Train, trainer: DistillTrainer) -> Iterator[None]:
    """Write the report of a run that a number stopped which is NaN or infinite."""
    try:
        yield
    except FloatingPointError as error:
        if not trainer.is_world_process_zero():
            raise
        report = write_run_report(options.out)
        raise FloatingPointError(f"{error}. Report: {report}") from error


def _last_evaluation(trainer: DistillTrainer) -> dict[str, Any] | None:
    """Return the evaluation of the trained weights, or None if training did not end with one."""
    if trainer.args.load_best_model_at_end:  # the weights may be those of an earlier step
        return None
    log = trainer.state.log_history
    step = trainer.state.global_step
    return next((e for e in reversed(log) if "eval_loss" in e and e["step"] == step), None)


def _recorded_evaluation(options: Train, step: int) -> dict[str, Any] | None:
    """Return the last evaluation of a finished run, or None if the run has no up-to-date report."""
    record, report = read_run(options.out), Path(options.out, "report.html")
    ends = record.events("train_end")
    if not ends or not report.exists() or report.stat().st_mtime < ends[-1]["time"]:
        return None
    evaluations = [line for line in record.metrics if "eval_loss" in line and line["step"] == step]
    return evaluations[-1] if evaluations else None if options.eval_data else {}


def dry_run(options: Train, extra: dict[str, Any]) -> Checked:
    """Run every check that needs no weights, and return the size of the run.

    Models are built on the meta device, so the checks are those of the run itself.
    """
    config, (data, held_out) = _config(options, extra), _load_data(options)
    check_named_checkpoint(config.resume_from_checkpoint)
    student = prepare_loaded(
        outline_model("student", options.student), config, _adapters(options.lora_rank)
    )
    tokenizer = open_tokenizer(options.tokenizer or options.student)
    tokenizer = with_chat_template(tokenizer, config.chat_template)
    encoder = Encoder(
        tokenizer=tokenizer,
        completion_only=config.completion_only_loss,
        max_length=config.max_length,
        template_tokens=config.train_on_template_tokens,
    )
    if config.check_data:
        check_datasets(encoder, data, held_out, prompts_only=config.lmbda == 1.0)
    check_sampling(config, data)
    check_metric(config, held_out, has_teacher=options.teacher is not None)
    teacher, datasets = None, datasets_by_name(data, held_out)
    if options.teacher is not None:
        teacher = outline_teacher(options.teacher, options.teacher_quant, options.teacher_compute)
    try:
        check_fit(teacher, student, config, tokenizer)
        if config.check_data:
            check_cache_covers(teacher, encoder, datasets)
            check_lengths(datasets, encoder, row_limits(student, teacher, config), config)
        if isinstance(teacher, ServedTeacher) and config.k is not None:
            teacher.check(k=config.k, temperature=config.temperature)
    finally:
        if isinstance(teacher, ServedTeacher):
            teacher.close()
    lengths = {name: _lengths(name, lines, encoder) for name, lines in datasets.items()}
    train = lengths["train_dataset"]
    return Checked(
        examples=len(data),
        tokens=train.tokens,
        targets=train.targets,
        longest=train.longest if train.limit is None else min(train.longest, train.limit),
        cut={name: part.to_text() for name, part in lengths.items() if part.rows},
        without_targets={
            name: part.seen - part.taught
            for name, part in lengths.items()
            if part.taught < part.seen and not (name == "train_dataset" and config.lmbda == 1.0)
        },
        steps=_steps(config, data, encoder),
    )


def print_result(result: Trained | Checked) -> None:
    for line in result.to_lines():
        say(printable(line, None))


def _config(options: Train, extra: dict[str, Any]) -> DistillConfig:
    integer("lora_rank", options.lora_rank, 1, optional=True)
    defaults: dict[str, Any] = {"eval_on_start": options.eval_data is not None}
    if options.teacher is None:
        defaults["ce_weight"] = 1.0
    settings = {"disable_tqdm": True, **defaults, **_coerced(extra)}
    return DistillConfig(output_dir=str(options.out), **settings)


def _coerced(extra: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(DistillConfig)
    return {name: coerce(name, value, hints[name]) for name, value in extra.items()}


def _load_data(options: Train) -> tuple[Any, Any]:
    """Return the two datasets; raises first for models that are not there."""
    model_source("student", options.student)
    if options.teacher is not None:
        source_of("teacher", options.teacher)
    held_out = None
    if options.eval_data is not None:
        held_out = open_dataset(options.eval_data, "eval_data")
    return open_dataset(options.data), held_out


def _lengths(name: str, rows: Sequence[Any] | None, encoder: Encoder) -> Lengths:
    """Encode every row as training would; raises for a row that training would reject."""
    lengths = Lengths(encoder.max_length)
    for index, row in enumerate(rows or ()):
        lengths.add(encoder.encode_uncut(row, index, name))
    return lengths


def _adapters(rank: int | None) -> Any:
    if rank is None:
        return None
    peft = require("peft", "lora_rank", "'fastdistill[peft]'")
    return peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _steps(config: DistillConfig, data: Sequence[Any], encoder: Encoder) -> int:
    if config.max_tokens_per_batch is not None:
        batches = math.ceil(len(token_batches(config, data, encoder)) / config.world_size)
    else:
        batches = math.ceil(len(data) / (config.train_batch_size * config.world_size))
    if config.max_steps > 0:
        return int(config.max_steps)
    steps: int = math.ceil(batches / config.gradient_accumulation_steps * config.num_train_epochs)
    return steps
