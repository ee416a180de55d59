"""fastdistill audit: student, teacher and base side by side, one page and one JSON file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from ..audits.audit import Audit as OneAudit
from ..audits.behaviour import BehavioralAudit
from ..audits.generic import GENERIC_PROBES
from ..audits.probes import PROBES, Probes
from ..audits.result import AuditResult
from ..audits.side_by_side import run_suite
from ..audits.subject import Subject
from ..backend import versions
from ..files import write_json
from ..organisms.stored import load_organism
from ..report.audit_page import audit_page, summary
from ..resolve import is_adapter
from ..stored_model import StoredModel
from .opening import check_device, quiet, running
from .printing import say
from .verbs import Audit


def dry(own: Audit, more: dict[str, Any]) -> dict[str, Any]:
    """The audits that would run, of which models; a folder that is not there is said now."""
    check_device(own.device)
    for name in _names(own).values():
        StoredModel.at(name)
    return {"audits": list(_suite(own)), "models": _names(own), "out": str(own.out)}


def run(own: Audit, more: dict[str, Any]) -> dict[str, Any]:
    quiet()
    check_device(own.device)
    suite = _suite(own)
    names = _names(own)
    models = {key: _opened(own, key, name) for key, name in names.items()}
    controls = [key for key in ("base", "benign") if key in models]
    with running("audit"):
        found = run_suite(suite, models, base=models["base"], controls=controls)
        about = {"command": _command(), "models": names, "versions": versions()}
        own.out.mkdir(parents=True, exist_ok=True)
        result = {**about, "lead": summary(found), **found.as_json()}
        write_json(own.out / "results.json", result)
        audit_page(found, about=about).write(own.out / "report.html")
        if own.log_dir is not None:
            _logs(own.log_dir, suite, models, found.results)
    return {**result, "report": str(own.out / "report.html")}


def tell(found: dict[str, Any]) -> None:
    if "lead" not in found:
        say("audits: " + ", ".join(found["audits"]))
        say("models: " + ", ".join(f"{k} {v}" for k, v in found["models"].items()))
        return
    say(found["lead"])
    for audit in found["audits"]:
        low, high = audit["interval"]
        bounds = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        say(f"  {audit['name']:24} {audit['model']:8} {audit['value']:9.3f}{bounds}")
    for name, reason in found["left_out"].items():
        say(f"left out: {name}. {reason}")
    say(f"The report is {found['report']}")


def _names(own: Audit) -> dict[str, str]:
    given = {"student": own.model, "teacher": own.teacher, "base": own.base, "benign": own.benign}
    return {key: name for key, name in given.items() if name is not None}


def _opened(own: Audit, key: str, name: str) -> Subject:
    under = own.base if is_adapter(name) and key != "base" else None
    return load_organism(name, base=under, name=key, device=own.device)


def _suite(own: Audit) -> dict[str, OneAudit]:
    suite = _probes(own).suite()
    unknown = [name for name in own.only if name not in suite]
    if unknown:
        raise ValueError(f"only: expected names among {', '.join(suite)}, got {', '.join(unknown)}")
    return {name: audit for name, audit in suite.items() if not own.only or name in own.only}


def _probes(own: Audit) -> Probes:
    if own.probes is not None:
        return Probes.load(own.probes)
    for name in (own.model, own.teacher):
        if name is not None and (Path(name).expanduser() / PROBES).is_file():
            return Probes.load(Path(name).expanduser() / PROBES)
    return GENERIC_PROBES


def _command() -> str:
    return shlex.join(["fastdistill", *sys.argv[1:]])


def _logs(
    folder: Path,
    suite: dict[str, OneAudit],
    models: dict[str, Subject],
    results: dict[str, dict[str, AuditResult]],
) -> None:
    """Behavioural audits as runs of Inspect, the others as logs that it reads."""
    from ..audits.inspect_log import export_log
    from ..audits.inspect_tasks import run_with_inspect

    for name, row in results.items():
        audit = suite[name]
        for key, result in row.items():
            if isinstance(audit, BehavioralAudit):
                run_with_inspect(audit, models[key], log_dir=folder)
            else:
                export_log(result, folder / f"{name.replace(' ', '-')}_{key}.eval")
