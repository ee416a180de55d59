"""`fastdistill audit`: compare student, teacher and base in one page and one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..alignment.audits.audit import Audit as OneAudit
from ..alignment.audits.catalog import CATALOG, skipped_audits
from ..alignment.audits.generic_probes import GENERIC_PROBES
from ..alignment.audits.probes import PROBES, Probes
from ..alignment.audits.result import AuditResult
from ..alignment.audits.side_by_side import run_suite
from ..alignment.organisms.storage import load_organism
from ..alignment.report.audit_page import audit_page, summary
from ..hf.checkpoint import StoredModel
from ..runtime.atomic_files import write_json
from ..runtime.backend import versions
from .loaders import as_exit_code_1, check_device
from .printing import command_line, say
from .verbs import Audit


def dry_run(options: Audit, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the audits that would run and their models; raises for a missing folder."""
    check_device(options.device)
    suite, skipped = _suite(options, _stored(options))
    return {
        "audits": list(suite),
        "skipped": skipped,
        "models": _names(options),
        "out": str(options.out),
    }


def run(options: Audit, extra: dict[str, Any]) -> dict[str, Any]:
    check_device(options.device)
    stored, names = _stored(options), _names(options)
    suite, skipped = _suite(options, stored)
    models = {}
    for key, source in stored.items():
        base = stored["base"].path if source.is_adapter and key != "base" else None
        models[key] = load_organism(source.path, base=base, name=key, device=options.device)
    controls = [key for key in ("base", "benign") if key in models]
    with as_exit_code_1("audit"):
        comparison = run_suite(suite, models, base=models["base"], controls=controls)
        about = {"command": command_line(), "models": names, "versions": versions()}
        options.out.mkdir(parents=True, exist_ok=True)
        lead = summary(comparison)
        result = {**about, "lead": lead, **comparison.as_json(), "skipped": skipped}
        write_json(options.out / "results.json", result)
        audit_page(comparison, about=about, skipped=skipped).write(options.out / "report.html")
        if options.log_dir is not None:
            _write_logs(options.log_dir, comparison.results)
    return {**result, "report": str(options.out / "report.html")}


def print_result(result: dict[str, Any]) -> None:
    if "lead" not in result:
        say("audits: " + ", ".join(result["audits"]))
        say("models: " + ", ".join(f"{k} {v}" for k, v in result["models"].items()))
        _print_skipped(result["skipped"])
        return
    say(result["lead"])
    for audit in result["audits"]:
        low, high = audit["interval"]
        bounds = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        figures = f"{audit['name']:24} {audit['model']:8} {audit['value']:9.3f}{bounds}"
        say(f"  {figures}  {CATALOG[audit['name']].measures}")
    for name, reason in result["left_out"].items():
        say(f"skipped: {name}. {reason}")
    _print_skipped(result["skipped"])
    say(f"Report: {result['report']}")


def _print_skipped(skipped: dict[str, str]) -> None:
    for name, needs in skipped.items():
        say(f"not enabled by the probes: {name}, {needs}")


def _names(options: Audit) -> dict[str, str]:
    names = {
        "student": options.model,
        "teacher": options.teacher,
        "base": options.base,
        "benign": options.benign,
    }
    return {key: name for key, name in names.items() if name is not None}


def _stored(options: Audit) -> dict[str, StoredModel]:
    """Return the models by name, downloaded if needed; raises for what is no model."""
    return {
        key: StoredModel.from_path(name, role="model" if key == "student" else key)
        for key, name in _names(options).items()
    }


def _suite(
    options: Audit, stored: dict[str, StoredModel]
) -> tuple[dict[str, OneAudit], dict[str, str]]:
    """Return the audits by name, and {audit: the keys that the probes lack for it}."""
    probes = _probes(options, stored)
    suite = probes.suite()
    skipped = skipped_audits(probes)
    unknown = [name for name in options.only if name not in suite]
    if unknown:
        needs = "; ".join(f"{name} {skipped[name]}" for name in unknown if name in skipped)
        hint = f"; of the probes, {needs}" if needs else ""
        raise ValueError(
            f"only: expected names among {', '.join(suite)}, got {', '.join(unknown)}{hint}"
        )
    if not options.only:
        return suite, skipped
    return {name: audit for name, audit in suite.items() if name in options.only}, {}


def _probes(options: Audit, stored: dict[str, StoredModel]) -> Probes:
    if options.probes is not None:
        return Probes.load(options.probes)
    for key in ("student", "teacher"):
        if key in stored and (stored[key].path / PROBES).is_file():
            return Probes.load(stored[key].path / PROBES)
    return GENERIC_PROBES


def _write_logs(folder: Path, results: dict[str, dict[str, AuditResult]]) -> None:
    """Write every result as a log of Inspect."""
    from ..alignment.audits.inspect.log import export_log

    for name, row in results.items():
        for key, result in row.items():
            export_log(result, folder / f"{name.replace(' ', '-')}_{key}.eval")
