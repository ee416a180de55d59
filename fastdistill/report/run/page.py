"""Writes report.html of a run from its metrics.jsonl and run.json, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...training.logs.run_files import NAME, RunRecord, read_run
from ..html import Report, to_text
from .plots import Line, Picture, Quantity, curves, histogram
from .series import (
    COSTS,
    MASSES,
    TRAINING,
    changes_on_resume,
    completion_summary,
    evaluated,
    evaluations,
    failure,
    has_ended,
    incomparable,
    lines,
    missing_data,
    name_of,
    quantities,
    resumed_steps,
    scores,
    training_summary,
)

_LEADING = ("loss", "kl", "agreement", "perplexity")  # the curves that lead the page
_COMPARED = ("kl", "agreement", "perplexity", "loss")


def write_run_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write a self-contained HTML report of a run and return its path.

    Args:
        folder: a run's output folder, or a folder of several runs to compare.
        out: the file to write; by default report.html in `folder`.

    Raises:
        FileNotFoundError: there is no metrics.jsonl in the folder or its subfolders.
    """
    folder = Path(folder)
    if (folder / NAME).is_file():
        report = run_report(folder.resolve().name, read_run(folder))
    else:
        runs = {
            path.parent.name: read_run(path.parent) for path in sorted(folder.glob(f"*/{NAME}"))
        }
        if not runs:
            raise FileNotFoundError(
                f"folder: expected a run's {NAME}, or folders that have one, in {str(folder)!r}, "
                "got none. Pass the output_dir of a DistillTrainer, which writes the file during "
                "training"
            )
        report = comparison(folder.resolve().name, runs)
    path = folder / "report.html" if out is None else Path(out)
    report.write(path)
    return path


def run_report(name: str, record: RunRecord) -> Report:
    """Return the report of one run."""
    first, second, *others = [*summary_sentences(record), ""]
    report = Report(f"Training run: {name}", f"{first} {second}".strip())
    resumed = resumed_steps(record)
    training = quantities(record)
    drawn = [key for key in _LEADING if lines(record, key)]
    _gallery(report, "", _curves(record, {key: training[key] for key in drawn}, resumed))
    _first_and_last(report, record)
    resumed_note = "Vertical lines mark the steps at which it was resumed." if resumed else ""
    if text := " ".join(filter(None, (*others, resumed_note))):
        report.paragraph(text)
    _samples(report, record)
    rest = {key: quantity for key, quantity in training.items() if key not in drawn}
    _gallery(report, "More curves", _curves(record, rest, resumed))
    masses = [
        Line(label=label, points=series.points)
        for key, label in (("teacher_mass", "teacher"), ("student_mass", "student"))
        if (series := evaluated(record, key) or next(iter(lines(record, key)), None))
    ]
    if masses:
        mass = Quantity(title="Mass on the teacher's k tokens", unit="%", share=True)
        _gallery(
            report,
            "Covered mass",
            [curves(mass, masses, resumed=resumed)],
            "Probability that teacher and student assign to the teacher's k tokens. The student "
            "learns the teacher's remaining probability as one outcome, or not at all, depending "
            "on the tail.",
        )
    histograms_by_title = scores(record)
    _gallery(
        report,
        "Token scores",
        [histogram(title, series) for title, series in histograms_by_title.items()],
        "Distribution of target tokens over each score, in half octaves of nats. It shows whether "
        "many tokens differ slightly or a few differ strongly.",
    )
    _gallery(report, "Memory and speed", _curves(record, COSTS, resumed))
    _first_batch(report, record)
    _settings(report, record)
    notes = missing_data(record)
    if notes:
        with report.folded("Missing data"):
            for sentence in notes:
                report.paragraph(sentence)
    return report


def summary_sentences(record: RunRecord) -> list[str]:
    """Return sentences on a run, the most important first: one that failed says so."""
    ending = completion_summary(record)
    alarms = [sentence for sentence in (failure(record),) if sentence]
    if not has_ended(record):
        alarms.append(ending)
    resumed_with = changes_on_resume(record)
    sentences = [*alarms, training_summary(record), *([resumed_with] if resumed_with else [])]
    training, changed = quantities(record), incomparable(record)
    changes = [
        _change(training[key], line)
        for key in ("kl", "agreement", "perplexity")
        if key not in changed and (line := evaluated(record, key)) is not None
    ]
    if changes:
        *others, last = changes
        text = f"{', '.join(others)} and {last}" if others else last
        sentences.append(f"In evaluation, {text}.")
    elif "loss" not in changed and (loss := lines(record, "loss")):
        sentences.append(f"In training, {_change(training['loss'], loss[0])}.")
    return sentences if ending in alarms else [*sentences, ending]


def _change(quantity: Quantity, line: Line) -> str:
    title = quantity.title if quantity.title[:2].isupper() else quantity.title.lower()
    first, last = quantity.text(line.first), quantity.text(line.last)
    unit = f" {quantity.unit}" if quantity.unit.startswith("nats") else ""
    if len(line.points) == 1:
        return f"{title} was {last}{unit} at step {line.points[0][0]:,}"
    if first == last:
        return f"{title} stayed at {last}{unit}"
    return f"{title} {'rose' if line.last > line.first else 'fell'} from {first} to {last}{unit}"


def _first_and_last(report: Report, record: RunRecord) -> None:
    """Add a table of the first and last value of each metric."""
    rows = []
    for key, quantity in (quantities(record) | MASSES | COSTS).items():
        all_series = lines(record, key)
        for line in all_series:
            dataset = "" if len(all_series) == 1 and line.label == "training" else f", {line.label}"
            unit_in_title = quantity.share or quantity.unit in quantity.title.lower()
            label = f"{quantity.title}{dataset}" + ("" if unit_in_title else f" ({quantity.unit})")
            first, last = (quantity.text(value) for value in (line.first, line.last))
            rows.append((label, first, last, f"{line.points[-1][0]:,}"))
    if rows:
        report.table(("metric", "first", "last", "at step"), rows, caption="First and last values.")


def _curves(
    record: RunRecord, quantities: dict[str, Quantity], resumed: list[int]
) -> Iterable[Picture]:
    for key, quantity in quantities.items():
        series = lines(record, key)
        if series:
            yield curves(quantity, series, resumed=resumed)


def _gallery(report: Report, heading: str, pictures: Iterable[Picture], text: str = "") -> None:
    """Add figures, and below them the folded text on what they show."""
    figures = list(pictures)
    if figures:
        if heading:
            report.heading(heading)
        report.gallery(figures)
        if text:
            with report.folded("What this shows"):
                report.paragraph(text, soft=True)


def _first_batch(report: Report, record: RunRecord) -> None:
    for panel in record.events("first_batch")[:1]:
        report.heading("The first batch, before the first update")
        signal = panel["signal"]
        rows = [
            (
                f"KL to the teacher (top {panel['k']} and tail), nats",
                *(_nats(panel["kl"]), _nats(panel["kl_shuffled"])),
            ),
            ("teacher's NLL, nats", _nats(signal["nll"]), _nats(signal["nll_shuffled"])),
            ("covered teacher mass", f"{panel['teacher_mass'] * 100:.1f} %", ""),
            ("its 5th percentile", f"{panel['teacher_mass_p5'] * 100:.1f} %", ""),
            (f"overlap of the top {panel['k']}", f"{panel['overlap'] * 100:.1f} %", ""),
            ("target tokens", f"{panel['tokens']:,}", ""),
        ]
        report.table(
            ("", "measured", "shuffled"),
            rows,
            caption="The control is the same answers in another order. The NLL of a teacher that "
            "fits this text is below the control's. The KLs differ only once the student predicts "
            "the text.",
        )


def _nats(value: float | None) -> str:
    """Return a number of nats; the log has None for NaN and infinity."""
    if value is None:
        return "—"
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.4g}"


def _samples(report: Report, record: RunRecord) -> None:
    """Add samples of the student: the last ones, and folded the earlier ones."""
    events = record.events("samples")
    if not events:
        return

    def rows(events: list[dict[str, Any]]) -> list[tuple[str, ...]]:
        return [
            (f"{event['step']:,}", sample["prompt"], sample["completion"])
            for event in events
            for sample in event["samples"]
        ]

    header = ("step", "prompt", "completion")
    report.heading("Samples of the student")
    report.table(header, rows(events[-1:]), caption="Truncated.", is_text=True)
    if len(events) > 1:
        with report.folded("Earlier samples"):
            report.table(header, rows(events[:-1]), is_text=True)


def _settings(report: Report, record: RunRecord) -> None:
    settings = record.settings
    if settings is None:
        return
    report.heading("Settings")
    config, changed = settings["config"], settings["changed"]
    student = settings["student"]
    counted = student["parameters"]
    size = "" if counted is None else f", {counted:,} parameters, {student['trainable']:,} trained"
    rows = [
        ("student", f"{name_of(student['name']) or student['class']}{size}"),
        ("teacher", str(name_of(settings["teacher"]) or "none: the labels alone")),
        *((name, to_text(config[name])) for name in changed),
    ]
    report.table(("setting", "value"), rows, caption="Settings that differ from the defaults.")
    others = [(name, to_text(v)) for name, v in sorted(config.items()) if name not in changed]
    with report.folded(f"{len(others)} settings at their defaults"):
        report.table(("setting", "value"), others)
    machine, versions = settings["machine"], settings["versions"]
    gpus = ", ".join(sorted(set(machine["gpus"]))) or f"CPU, {machine['cpu_capability']}"
    processes = settings["processes"]
    report.paragraph(
        f"{gpus}, {machine['machine']}, {processes} process{'es' if processes > 1 else ''}, "
        f"{machine['threads']} threads. {', '.join(f'{n} {v}' for n, v in versions.items())}.",
        soft=True,
    )


def comparison(name: str, runs: dict[str, RunRecord]) -> Report:
    """Return a report of several runs, with joint curves and the settings that differ."""
    sentences = [f"{len(runs)} runs: {', '.join(runs)}."]
    kls = {run: line for run, r in runs.items() if (line := evaluated(r, "kl")) is not None}
    compared = {run: quantities(runs[run]) for run in kls}
    is_one_kl = len({each["kl"].title for each in compared.values()}) == 1
    training = next(iter(compared.values())) if is_one_kl else TRAINING
    if kls and not is_one_kl:
        sentences.append("Their KLs compare different k or temperatures: do not compare them.")
    elif len(kls) > 1:
        best = min(kls, key=lambda run: kls[run].last)
        text = training["kl"].text(kls[best].last)
        sentences.append(f"{best} has the lowest KL in its last evaluation: {text} nats per token.")
    failed = [run for run, record in runs.items() if failure(record)]
    if failed:
        sentences[1:] = [f"Unusable, as stated below the table: {', '.join(failed)}."]
    report = Report(f"Runs of {name}", " ".join(sentences))
    in_evaluation = any(evaluations(record) for record in runs.values())
    by_key = {key: _series_of_runs(runs, key, in_evaluation) for key in _COMPARED}
    pictures = [
        curves(training[key], list(series.values()))._replace(caption=training[key].title)
        for key, series in by_key.items()
        if series
    ]
    _gallery(report, "", pictures)
    report.table(
        ("run", *(training[key].title for key in _COMPARED)),
        [
            (
                run,
                *(
                    training[key].text(series[run].last) if run in series else "—"
                    for key, series in by_key.items()
                ),
            )
            for run in runs
        ],
        caption=f"Last values in {'evaluation' if in_evaluation else 'training'}.",
    )
    for run, record in runs.items():
        if text := failure(record):
            report.paragraph(f"{run}: {text}")
    _differences(report, runs)
    with report.folded("The runs in words"):
        for run, record in runs.items():
            report.paragraph(f"{run}: {' '.join(summary_sentences(record))}")
    return report


def _series_of_runs(runs: dict[str, RunRecord], key: str, in_evaluation: bool) -> dict[str, Line]:
    """Return a metric of every run that has it, in evaluation or else in training."""
    series = {
        run: evaluated(record, key) if in_evaluation else next(iter(lines(record, key)), None)
        for run, record in runs.items()
    }
    return {run: replace(line, label=run) for run, line in series.items() if line is not None}


def _differences(report: Report, runs: dict[str, RunRecord]) -> None:
    configs = {run: r.settings["config"] for run, r in runs.items() if r.settings is not None}
    names = sorted({name for config in configs.values() for name in config})
    settings = ((n, *(to_text(config.get(n)) for config in configs.values())) for n in names)
    rows = [(name, *values) for name, *values in settings if len(set(values)) > 1]
    if rows:
        report.heading("Settings that differ")
        report.table(("setting", *configs), rows)
