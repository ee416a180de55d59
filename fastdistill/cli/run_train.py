"""`fastdistill train`."""

from __future__ import annotations

import math
import sys
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, TrainingArguments

from ..examples import Encoder, check_example
from ..json_lines import JsonLines
from ..progress import Training
from ..run_report import write_run_report
from ..run_series import has_diverged
from ..runtime.printable import printable
from ..served import ServedTeacher
from ..training.admission import check_fit
from ..training.arguments import check_metric, check_sampling
from ..training.checkpoints import last_finished
from ..training.config import DistillConfig
from ..training.data_checks import Lengths, check_datasets, datasets_by_name
from ..training.figures import format_short
from ..training.lengths import check_lengths, row_limits
from ..training.offline import check_cache_covers
from ..training.run_files import read_run
from ..training.student import prepare_loaded
from ..training.trainer import DistillTrainer
from .opening import outline, outlined_teacher, quiet, running, teacher_of, tokenizer_of
from .settings import fit
from .verbs import Train


def MORE() -> list[str]:
    """Settings of DistillConfig that key=value takes; its output_dir is ours."""
    names = [field.name for field in fields(DistillConfig) if field.init]
    return [name for name in names if name != "output_dir"]


def shown(own: Train, more: dict[str, Any]) -> dict[str, Any]:
    """What is ours, and of transformers' settings those that were given."""
    config = _config(own, more)
    inherited = {field.name for field in fields(TrainingArguments)}
    ours = {name: getattr(config, name) for name in MORE() if name not in inherited}
    return vars(own) | ours | _fitted(more)


def run(own: Train, more: dict[str, Any]) -> dict[str, Any] | None:
    quiet()
    config, (data, held_out) = _config(own, more), _data(own)
    tokenizer = tokenizer_of(own.tokenizer or own.student)
    teacher = None
    if own.teacher is not None:
        teacher = teacher_of(own.teacher, own.teacher_quant, own.teacher_compute, config.device)
    trainer = DistillTrainer(
        own.student,
        teacher,
        config,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=_adapters(own.lora_rank),
        callbacks=[Training()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.check_savable()
    start = time.perf_counter()
    if trainer.is_world_process_zero():
        print(_how_to_go_on(own, config), file=sys.stderr)
    resume = config.resume_from_checkpoint or ("auto" if own.resume else None)
    with running("train: stopped"), _interrupted(own):
        done = trainer.train(resume_from_checkpoint=resume)
        evaluated = _recorded(own, done.global_step) if trainer.already_done else None
        report: Path | None = Path(own.out, "report.html")
        if evaluated is None:
            trainer.save_model()
            evaluated = {} if held_out is None else trainer.evaluate()
            report = write_run_report(own.out) if trainer.is_world_process_zero() else None
    if report is None:
        return None
    return {
        "out": str(own.out),
        "report": str(report),
        "steps": done.global_step,
        "already_done": trainer.already_done,
        "loss": done.training_loss if math.isfinite(done.training_loss) else None,
        "diverged": has_diverged(read_run(own.out)),
        "evaluation": {name.removeprefix("eval_"): value for name, value in evaluated.items()},
        "seconds": time.perf_counter() - start,
    }


def _how_to_go_on(own: Train, config: DistillConfig) -> str:
    """Return what a stopped run leaves behind, to be told before it starts."""
    strategy = str(config.save_strategy.value)
    if strategy == "no":
        return "train: save_strategy=no: a run that is stopped leaves no checkpoint to go on from."
    if config.save_only_model:
        return (
            "train: save_only_model=true: a run that is stopped leaves its weights, and cannot be "
            "gone on with."
        )
    asked = config.save_on_interrupt and config.world_size == 1
    also = ", and one when it is stopped with Ctrl-C or SIGTERM" if asked else ""
    again = (
        "the same command goes on from the last one"
        if own.resume
        else "--resume goes on from the last one"
    )
    return f"train: checkpoints are written to {printable(own.out)}{also}; {again}."


@contextmanager
def _interrupted(own: Train) -> Iterator[None]:
    """Say what an interrupted run leaves behind."""
    try:
        yield
    except KeyboardInterrupt as error:
        there = last_finished(own.out)
        again = (
            f"The same command goes on from {there.name}."
            if there is not None and own.resume
            else "The same command begins at the first step: there is no checkpoint to go on from."
        )
        print(f"fastdistill: train: {error or 'Stopped.'} {again}", file=sys.stderr)
        raise


def _recorded(own: Train, step: int) -> dict[str, Any] | None:
    """Return the last evaluation of a run that wrote its report, the last thing it does; None if
    something of that is still to be done."""
    record, report = read_run(own.out), Path(own.out, "report.html")
    ends = record.events("train_end")
    if not ends or not report.exists() or report.stat().st_mtime < ends[-1]["time"]:
        return None
    found = [line for line in record.figures if "eval_loss" in line and line["step"] == step]
    return found[-1] if found else None if own.eval_data else {}


def dry(own: Train, more: dict[str, Any]) -> dict[str, Any]:
    """Return what a run would train on, after every check of it that needs no weights and no step.

    Models are built without weights, and the run's own checks see them.
    """
    quiet()
    config, (data, held_out) = _config(own, more), _data(own)
    student = prepare_loaded(outline("student", own.student), config, _adapters(own.lora_rank))
    tokenizer = tokenizer_of(own.tokenizer or own.student)
    encoder = Encoder(
        tokenizer=tokenizer,
        completion_only=config.completion_only_loss,
        max_length=config.max_length,
    )
    if config.check_data:
        check_datasets(encoder, data, held_out, prompts_only=config.lmbda == 1.0)
    check_sampling(config, data)
    check_metric(config, held_out, has_teacher=own.teacher is not None)
    teacher, datasets = None, datasets_by_name(data, held_out)
    if own.teacher is not None:
        teacher = outlined_teacher(own.teacher, own.teacher_quant, own.teacher_compute)
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
    found = lengths["train_dataset"]
    return {
        "dry_run": True,
        "examples": len(data),
        "tokens": found.tokens,
        "targets": found.targets,
        "longest": found.longest if found.limit is None else min(found.longest, found.limit),
        "cut": {name: part.in_words() for name, part in lengths.items() if part.rows},
        "steps": _steps(config, len(data)),
    }


def tell(found: dict[str, Any]) -> None:
    console = Console()
    if found.get("dry_run"):
        lines = [
            f"{found['examples']:,} examples, {found['tokens']:,} tokens, of which "
            f"{found['targets']:,} are targets; {found['steps']:,} steps.",
            *(f"{name}: {cut}." for name, cut in found["cut"].items()),
            "Settings, data and tokenizers fit together. `fastdistill plan` says what memory it "
            "takes.",
        ]
    else:
        figures = "  ".join(
            f"{name} {format_short(found['evaluation'][name])}"
            for name in ("kl", "agreement", "perplexity")
            if found["evaluation"].get(name) is not None
        )
        loss = "none" if found["loss"] is None else format_short(found["loss"])
        trained = f"{found['steps']:,} steps, loss {loss}, {found['seconds']:.0f} s."
        if found["already_done"]:
            trained = f"Already done at step {found['steps']:,}: nothing was trained."
        elif found["diverged"]:
            trained += " The loss rose: the run diverged. Lower the learning rate."
        lines = [
            trained,
            *([f"On the evaluation set: {figures}"] if figures else []),
            f"The student is in {found['out']}, the report is {found['report']}",
        ]
    for line in lines:
        console.print(printable(line, None), soft_wrap=True, markup=False, highlight=False)


def _config(own: Train, more: dict[str, Any]) -> DistillConfig:
    defaults: dict[str, Any] = {"disable_tqdm": True, "eval_on_start": own.eval_data is not None}
    if own.teacher is None:
        defaults["ce_weight"] = 1.0
    return DistillConfig(output_dir=str(own.out), **{**defaults, **_fitted(more)})


def _fitted(more: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(DistillConfig)
    return {name: fit(name, value, hints[name]) for name, value in more.items()}


def _data(own: Train) -> tuple[JsonLines, JsonLines | None]:
    held_out = None
    if own.eval_data is not None:
        held_out = JsonLines(own.eval_data, "eval_data", check_example)
    return JsonLines(own.data, check=check_example), held_out


def _lengths(name: str, lines: JsonLines | None, encoder: Encoder) -> Lengths:
    """Read every line as training would, so that none is refused later."""
    lengths = Lengths(encoder.max_length)
    for at in range(len(lines or ())):
        assert lines is not None
        lengths.add(encoder.whole(lines[at], at, name))
    return lengths


def _adapters(rank: int | None) -> Any:
    if rank is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("lora_rank: expected peft to be installed: pip install peft") from None
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _steps(config: DistillConfig, examples: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(examples / (config.train_batch_size * config.world_size))
    return math.ceil(batches / config.gradient_accumulation_steps * config.num_train_epochs)
