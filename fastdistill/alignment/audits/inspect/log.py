"""Export of audit results as logs for Inspect and its viewer."""

from __future__ import annotations

import math
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ....runtime.atomic_files import write_atomically
from ....runtime.checks import fail
from ..result import AuditResult, Control
from .package import inspect_ai

_SUFFIXES = (".eval", ".json")


def export_log(result: AuditResult, path: str | Path) -> None:
    """Writes a result as a log for inspect_ai.log.read_eval_log(path).

    The first score has the name of the audit and the metrics mean, stderr, low and high (bounds of
    the interval). One score per control, named "control: …", adds the difference from it. Unknown
    metrics are omitted. Each of result.values is a scored sample, with the answer where the audit
    reads answers. eval.metadata contains AuditResult.as_json().

    Args:
        path: ends with .eval, which Inspect's viewer lists in a folder, or with .json.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        fail("path", f"one that ends with {' or '.join(_SUFFIXES)}", path)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        inspect_ai.log.write_eval_log(_log(result), str(temporary))
        write_atomically(path, temporary.read_bytes())


def _log(result: AuditResult) -> Any:
    log = inspect_ai.log
    now = datetime.now(timezone.utc).isoformat()
    samples = [_sample(result, i, value) for i, value in enumerate(result.values)]
    metrics = {result.audit: _metrics(result)}
    for name, control in result.controls.items():
        metrics[f"control: {name}"] = _metrics(control) | {
            "difference": control.difference.value,
            "difference_low": control.difference.low,
            "difference_high": control.difference.high,
        }
    return log.EvalLog(
        status="success",
        eval=log.EvalSpec(
            created=now,
            task=result.audit,
            dataset=log.EvalDataset(
                name=result.audit, samples=result.n, sample_ids=[s.id for s in samples]
            ),
            model=f"fastdistill/{result.model}",
            config=log.EvalConfig(),
            packages=result.versions,
            metadata=result.as_json(),
        ),
        results=log.EvalResults(
            total_samples=result.n,
            completed_samples=result.n,
            scores=[_score(name, result.audit, values) for name, values in metrics.items()],
        ),
        stats=log.EvalStats(started_at=now, completed_at=now),
        samples=samples,
    )


def _metrics(measurement: AuditResult | Control) -> dict[str, float]:
    low, high = measurement.interval
    return {"mean": measurement.value, "stderr": measurement.stderr, "low": low, "high": high}


def _score(name: str, scorer: str, values: dict[str, float]) -> Any:
    metrics = {
        figure: inspect_ai.log.EvalMetric(name=figure, value=value)
        for figure, value in values.items()
        if not math.isnan(value)
    }
    return inspect_ai.log.EvalScore(name=name, scorer=scorer, metrics=metrics)


def _sample(result: AuditResult, index: int, value: float) -> Any:
    """Returns a sample, with its prompt where the audit's configuration has one per value."""
    prompts = result.config.get("prompts") or []
    prompt = prompts[index] if len(prompts) == len(result.values) else {}
    parts = [str(prompt[part]) for part in ("system", "user", "prefill", "text") if part in prompt]
    return inspect_ai.log.EvalSample(
        id=index + 1,
        epoch=1,
        input="\n\n".join(parts),
        target="",
        output=inspect_ai.model.ModelOutput.from_content(
            result.model, result.texts[index] if result.texts else ""
        ),
        scores={result.audit: inspect_ai.scorer.Score(value=float(value))},
    )
