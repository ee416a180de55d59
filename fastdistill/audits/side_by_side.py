"""A suite of audits over several models: every model measured once by each, then compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..progress import track
from .audit import Audit, Measurement
from .result import AuditResult
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class SuiteResults:
    """results[audit][model]: of every audited model, beside the same controls.

    readings[audit][model]: also of the controls, without any.
    left_out: audits that could not be made of some model, and why.
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
    """Run every audit on every model.

    Args:
        suite: name -> audit.
        models: name -> model; at least one is no control.
        base: what audits that compare with a trusted model compare with.
        controls: names among `models` of those that do not have what is looked for.

    An audit that a model does not admit (weights of another size beside the base, say) is left out
    as a whole, with its reason.
    """
    controls = tuple(controls)
    missing = [name for name in controls if name not in models]
    if missing or len(controls) >= len(models):
        raise ValueError(
            f"controls: expected names of some of the models {', '.join(models)}, and not of all, "
            f"got {', '.join(controls)}"
        )
    results: dict[str, dict[str, AuditResult]] = {}
    readings: dict[str, dict[str, AuditResult]] = {}
    left_out: dict[str, str] = {}
    for name in track(list(suite), "audits"):
        audit = suite[name]
        try:
            measurements = {key: audit.measure(model, base) for key, model in models.items()}
        except ValueError as error:
            left_out[name] = str(error)
            continue
        results[name] = _to_results(audit, measurements, controls)
        readings[name] = {
            key: audit.to_result(key, measurement, {}) for key, measurement in measurements.items()
        }
    return SuiteResults(results=results, readings=readings, left_out=left_out)


def _to_results(
    audit: Audit, measurements: Mapping[str, Measurement], controls: tuple[str, ...]
) -> dict[str, AuditResult]:
    control_measurements = {name: measurements[name] for name in controls}
    return {
        name: audit.to_result(name, measurement, control_measurements)
        for name, measurement in measurements.items()
        if name not in controls
    }
