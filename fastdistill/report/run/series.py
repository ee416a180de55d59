"""Turns the lines of a run's log into the curves, histograms and sentences of its report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.json_shape import has_shape
from ...training.logs.run_files import SETTINGS, RunRecord
from ..html import to_text
from .plots import Histogram, Line, Quantity

TRAINING = {
    "loss": Quantity(title="Loss", unit="per target token", falls=True),
    "kl": Quantity(title="KL to the teacher", unit="nats per token", falls=True),
    "agreement": Quantity(title="Agreement with the teacher", unit="% of tokens", share=True),
    "perplexity": Quantity(title="Perplexity", unit="perplexity", falls=True),
    "top1": Quantity(title="Next-token accuracy", unit="% of tokens", share=True),
    "learning_rate": Quantity(title="Learning rate", unit="learning rate"),
    "grad_norm": Quantity(title="Gradient norm", unit="norm", falls=True),
    "selected": Quantity(title="Tokens trained on", unit="% of tokens", share=True),
    "aligned": Quantity(title="Targets that both tokenizers have", unit="% of targets", share=True),
    "mapped_mass": Quantity(title="Teacher's mass on the student's tokens", unit="%", share=True),
}
MASSES = {
    "teacher_mass": Quantity(title="Teacher's mass on its k tokens", unit="%", share=True),
    "student_mass": Quantity(title="Student's mass on them", unit="%", share=True),
}
COSTS = {
    "peak_gpu_memory_gib": Quantity(
        title="Peak GPU memory (first process)", unit="GiB", grounded=True
    ),
    "peak_process_memory_gib": Quantity(
        title="Peak resident memory (first process)", unit="GiB", grounded=True
    ),
    "throughput": Quantity(title="Throughput", unit="target tokens per second", grounded=True),
}
# Settings that change the loss itself; those of _COMPARISON change the KL to the teacher too.
_COMPARISON = {"k", "temperature", "teacher"}
_OBJECTIVE = _COMPARISON | {
    *("divergence", "beta", "skew", "eta", "support", "tail", "t2_scale", "ce_weight", "z_loss"),
    *("token_selection", "lmbda"),
}
SCORES = {
    "nll": "NLL of the text",
    "forward_kl": "KL to the teacher",
    "entropy": "Entropy of the student",
    "margin": "Margin of its first choice over its second",
}


def quantities(record: RunRecord) -> dict[str, Quantity]:
    """Return TRAINING, with a title of the KL that says what it compares."""
    if record.settings is None:
        return TRAINING
    config = record.settings["config"]
    k, temperature = config["k"], config["temperature"]
    compared = "whole vocabulary" if k is None else f"top {k} and tail"
    at = "" if temperature == 1 else f", T = {temperature:g}"
    kl = TRAINING["kl"]
    return TRAINING | {"kl": replace(kl, title=f"{kl.title} ({compared}{at})")}


def points(record: RunRecord, name: str) -> list[tuple[int, float]]:
    """Return (step, value) for each step at which a metric is a number.

    If a step has two lines, as after an evaluation at the start of a resumed run, the later one
    counts.
    """
    values: dict[int, float] = {}
    for line in record.metrics:
        value: Any = line.get(name)
        if has_shape(value, float):
            values[line["step"]] = float(value)
    return list(values.items())


def evaluations(record: RunRecord) -> dict[str, str]:
    """Return {prefix: label} of evaluations; prefixes are "eval" or "eval_NAME" per dataset."""
    names: dict[str, str] = {}
    for line in record.metrics:
        for name in line:
            if name.startswith("eval") and name.endswith("_nll"):
                prefix = name[: -len("_nll")]
                name_suffix = prefix[len("eval_") :]
                names[prefix] = f"evaluation, {name_suffix}" if name_suffix else "evaluation"
    return names


def lines(record: RunRecord, name: str) -> list[Line]:
    """Return a metric in training and in every evaluation that logged it."""
    if name == "throughput":
        values = throughput(record)
    elif name == "perplexity":
        values = [(step, math.exp(min(nll, 700.0))) for step, nll in points(record, "nll")]
    else:
        values = points(record, name)
    series = {"training": values}
    for prefix, label in evaluations(record).items():
        series[label] = points(record, f"{prefix}_{name}")
    return [Line(label=label, points=values) for label, values in series.items() if values]


def evaluated(record: RunRecord, name: str) -> Line | None:
    """Return a metric in the first evaluation dataset, or None."""
    for prefix, label in list(evaluations(record).items())[:1]:
        values = points(record, f"{prefix}_{name}")
        if values:
            return Line(label=label, points=values)
    return None


def throughput(record: RunRecord) -> list[tuple[int, float]]:
    """Return target tokens per second between a training line and the line before it.

    Excludes the time of evaluations, which log when they end, but includes saving.
    """
    rates, previous = [], None
    for line in record.lines:
        tokens, now = line.get("target_tokens"), line["time"]
        if has_shape(tokens, float) and previous is not None and now > previous:
            rates.append((line["step"], tokens / (now - previous)))
        if line.get("event") != "first_batch":  # logged in the middle of a step
            previous = now
    return rates


def scores(record: RunRecord) -> dict[str, list[Histogram]]:
    """Return token scores by title, of the first and last evaluation or else the first batch."""
    by_title: dict[str, list[Histogram]] = {}
    for prefix, dataset in evaluations(record).items():
        events = [e for e in record.events("histograms") if e["of"] == prefix]
        suffix = "" if dataset == "evaluation" else f" ({dataset})"
        for event in events[:1] + events[1:][-1:]:
            _add_histograms(by_title, event, f"step {event['step']:,}", suffix)
    if not by_title:
        for event in record.events("first_batch")[:1]:
            _add_histograms(by_title, event, f"first batch, step {event['step']:,}")
    return by_title


def _add_histograms(
    by_title: dict[str, list[Histogram]], event: dict[str, Any], label: str, suffix: str = ""
) -> None:
    counts = event.get("counts", {})
    for name, title in SCORES.items():
        if name in counts:
            histogram = Histogram(label=label, edges=event["edges"], counts=counts[name])
            by_title.setdefault(title + suffix, []).append(histogram)


def resumed_steps(record: RunRecord) -> list[int]:
    """Return the steps from which the run was resumed."""
    return [event["step"] for event in record.events("train_begin") if event["step"]]


def changes_on_resume(record: RunRecord) -> str:
    """Return sentences on the settings that changed when the run was resumed."""
    sentences = []
    for event in record.events("train_begin"):
        changed = event.get("changed", {})
        if not changed:
            continue
        texts = (
            "{}={} instead of {}".format(name, *(to_text(_short(value)) for value in values))
            for name, values in changed.items()
        )
        is_other_loss = not _OBJECTIVE.isdisjoint(changed)
        note = "; losses before and after cannot be compared" if is_other_loss else ""
        sentences.append(f"It was resumed at step {event['step']:,} with {', '.join(texts)}{note}.")
    return " ".join(sentences)


def incomparable(record: RunRecord) -> set[str]:
    """Return the metrics whose meaning changed when the run was resumed."""
    changed = {n for event in record.events("train_begin") for n in event.get("changed", {})}
    metrics = set() if _OBJECTIVE.isdisjoint(changed) else {"loss"}
    return metrics if _COMPARISON.isdisjoint(changed) else metrics | {"kl", "agreement"}


def completion_summary(record: RunRecord) -> str:
    """Return a sentence on how the run ended."""
    marks = [e for e in record.lines if e.get("event") in ("train_begin", "train_end")]
    if not marks:
        return "It was not trained: the log has no start of training."
    step = max(line["step"] for line in record.lines)
    planned = next((e["max_steps"] for e in reversed(marks) if e.get("max_steps")), None)
    of_planned = "" if planned is None else f" of {planned:,}"
    resumed = resumed_steps(record)
    steps = ", ".join(f"{at:,}" for at in resumed)
    resumed_text = f" It was resumed from step {steps}." if resumed else ""
    if has_ended(record):
        return f"It ended at step {step:,}{of_planned}.{resumed_text}"
    return (
        f"Its log stops at step {step:,}{of_planned} without an end: it was interrupted, or is "
        f"still running.{resumed_text}"
    )


def has_ended(record: RunRecord) -> bool:
    """Return whether the log has the end of the training, or no start."""
    mark = _last_mark(record)
    return mark is None or mark["event"] != "train_begin"


def _last_mark(record: RunRecord) -> dict[str, Any] | None:
    kinds = ("train_begin", "train_end", "nonfinite")
    return next((e for e in reversed(record.lines) if e.get("event") in kinds), None)


def has_diverged(record: RunRecord) -> bool:
    """Return whether the training loss ended far above where it began."""
    loss = [value for _, value in points(record, "loss")]
    return bool(loss) and loss[-1] > 2 * max(loss[0], 0.0) + 1


def failure(record: RunRecord) -> str:
    """Return a sentence on a run whose numbers are unusable, or an empty text."""
    mark = _last_mark(record)
    if mark is not None and mark["event"] == "nonfinite":
        step, quantity = mark["step"], mark["of"]
        return f"The run stopped after step {step:,} because of NaN or infinity ({quantity})."
    if has_diverged(record):
        return "The loss increased: the run diverged, and the student is unusable."
    return ""


def training_summary(record: RunRecord) -> str:
    """Return a sentence on student, teacher and divergence, as far as they are recorded."""
    settings = record.settings
    if settings is None:
        return "A student was trained."
    student = settings["student"]
    student_name = name_of(student["name"]) or student["class"]
    if settings["teacher"] is None:
        return f"{student_name} was trained on the labels alone."
    config = settings["config"]
    k = config["k"]
    compared = "the whole vocabulary" if k is None else f"the teacher's top {k} tokens"
    teacher = name_of(settings["teacher"])
    return f"{student_name} learned from {teacher}: {config['divergence']} over {compared}."


def name_of(model: str | None) -> str | None:
    """Return a model's name, or the folder's name if it is an absolute path."""
    return Path(model).name if model is not None and Path(model).is_absolute() else model


def _short(value: Any) -> Any:
    return name_of(value) if isinstance(value, str) else value


def missing_data(record: RunRecord) -> list[str]:
    """Return sentences on data that the folder lacks, and on how to record it."""
    notes, prefixes = [], evaluations(record)
    if record.settings is None:
        notes.append(
            f"No readable {SETTINGS}, so models, settings and versions are not shown. The trainer "
            "writes it next to metrics.jsonl when training begins."
        )
    if not record.metrics:
        notes.append("No metrics yet. The trainer logs every logging_steps=N steps.")
    elif not prefixes:
        notes.append(
            "No evaluation, so no KL, agreement, perplexity or token scores on held-out text. Pass "
            "eval_dataset to the trainer, and set eval_strategy='steps' and eval_steps=N; "
            "eval_on_start=True also evaluates the student before training."
        )
    elif not any(points(record, f"{prefix}_kl") for prefix in prefixes):
        notes.append(
            "No teacher in the evaluation, so no KL, agreement or covered mass. Pass a teacher to "
            "the trainer."
        )
    if prefixes and not record.events("histograms"):
        notes.append(
            "No token scores of an evaluation. Each evaluation during training records them."
        )
    if record.metrics and not any(points(record, name) for name in COSTS):
        notes.append("No memory in the log. The trainer of this version records its peak.")
    if record.metrics and not points(record, "target_tokens"):
        notes.append("No token counts in the log, so no throughput. The trainer records them.")
    nulls = sorted({n for line in record.metrics for n, v in line.items() if v is None})
    if nulls:
        notes.append(f"NaN or infinite at some steps, and left out there: {', '.join(nulls)}.")
    if record.damaged:
        notes.append(f"Truncated lines of metrics.jsonl that were left out: {record.damaged}.")
    return notes
