"""A suite of audits over several models. Each audit measures each model once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.checks import fail
from ...runtime.progress import track
from .audit import Audit
from .result import AuditResult
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """Results of a suite.

    results[audit][model]: of every audited model, compared with the controls.
    readings[audit][model]: of every model including the controls, without a comparison.
    left_out[audit]: the reason why an audit could not run on some model.
    """

    results: dict[str, dict[str, AuditResult]]
    readings: dict[str, dict[str, AuditResult]]
    left_out: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "audits": [
                {"name": name, **result.as_json()}
                for name, row in self.results.items()
                for result in row.values()
            ],
            "left_out": self.left_out,
        }


def run_suite(
    suite: Mapping[str, Audit],
    models: Mapping[str, Subject],
    *,
    base: Subject,
    controls: Iterable[str] = ("base",),
) -> SuiteResults:
    """Runs every audit on every model.

    Args:
        suite: name -> audit.
        models: name -> model; at least one must not be a control.
        base: the trusted model, for audits that need one.
        controls: names among `models` of those without the trait.

    An audit that cannot run on one of the models (for example with weights of another shape than
    the base's) is skipped for all models, with the reason.
    """
    controls = tuple(controls)
    missing = [name for name in controls if name not in models]
    if missing or len(controls) >= len(models):
        expected = f"names of some of the models {', '.join(models)}, and not of all"
        fail("controls", expected, ", ".join(controls))
    results: dict[str, dict[str, AuditResult]] = {}
    readings: dict[str, dict[str, AuditResult]] = {}
    left_out: dict[str, str] = {}
    for name, audit in track(list(suite.items()), "audit", label=lambda item: item[0]):
        try:
            measured = {key: audit.measure_with_warnings(m, base) for key, m in models.items()}
        except ValueError as error:
            left_out[name] = str(error)
            continue
        compared = {key: measured[key] for key in controls}
        results[name] = {
            key: audit.to_result(key, measurement, compared)
            for key, measurement in measured.items()
            if key not in controls
        }
        readings[name] = {
            key: audit.to_result(key, measurement, {}) for key, measurement in measured.items()
        }
    return SuiteResults(results=results, readings=readings, left_out=left_out)
