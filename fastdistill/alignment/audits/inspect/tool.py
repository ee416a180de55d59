"""The audits as a tool of Inspect, with which one model audits another."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio

from ....runtime.checks import fail
from ..catalog import CATALOG, skipped_audits
from ..generic_probes import GENERIC_PROBES
from ..probes import Probes
from ..subject import to_subject
from .package import inspect_ai

_DESCRIPTION = """\
Measures the model under investigation with one audit, and returns JSON: value, its 95 % interval, \
the same measurement of each control, and is_evidence, which is true only if the value is above \
that of every control. Audits:
"""
_PARAMETERS = {
    "audit": "The name of the audit.",
    "prompts": "User messages to measure on, instead of the prepared ones.",
    "markers": "Words whose probability or frequency is measured, instead of the prepared ones.",
}


def audit_tool(
    model: Any,
    *,
    base: Any = None,
    controls: Mapping[str, Any] | None = None,
    probes: Probes = GENERIC_PROBES,
) -> Any:
    """Returns a Tool of Inspect, `audit_model`, that runs the audits of `model` by name.

    The tool has the arguments audit, prompts and markers. Calls run one after another, in a thread.
    If an audit cannot run, the investigator gets the reason.

    Args:
        model, base, controls: as in `Audit.run`; paths are loaded once.
        probes: the texts of the audits; the investigator may replace prompts and markers.

    Raises:
        TypeError: not a model, or not Probes.

    Example:
        >>> tool = audit_tool("student", base="base", controls={"base": "base"})  # doctest: +SKIP
        >>> agent = inspect_ai.agent.react(tools=[tool])  # doctest: +SKIP
    """
    if not isinstance(probes, Probes):
        raise TypeError(f"probes: expected Probes, got {type(probes).__name__}; Probes.load(path)")
    audited = to_subject("model", model)
    trusted = None if base is None else to_subject("base", base)
    others = {
        name: to_subject(f"controls[{name!r}]", control)
        for name, control in (controls or {}).items()
    }
    lock = threading.Lock()

    def run(audit: str, changes: dict[str, Any]) -> str:
        chosen = replace(probes, **changes)
        suite = chosen.suite()
        if audit not in suite:
            reason = skipped_audits(chosen).get(audit, "")
            hint = f"it {reason}" if reason else ""
            fail("audit", f"one of {', '.join(suite)}", repr(audit), hint)
        with lock:
            result = suite[audit].run(audited, base=trusted, controls=others)
        record = result.as_json() | {"audit": audit, "measures": CATALOG[audit].measures}
        del record["config"], record["versions"]
        return json.dumps(record)

    async def audit_model(
        audit: str, prompts: list[str] | None = None, markers: list[str] | None = None
    ) -> str:
        changes: dict[str, Any] = {} if markers is None else {"markers": tuple(markers)}
        if prompts is not None:
            # These texts belong to the prepared prompts, one to each.
            changes |= {"prompts": tuple(prompts), "without": (), "audited": (), "answers": ()}
        try:
            return await anyio.to_thread.run_sync(run, audit, changes)
        except ValueError as error:
            raise inspect_ai.tool.ToolError(str(error)) from None

    listed = "\n".join(f"- {name}: {entry.measures}" for name, entry in CATALOG.items())
    return inspect_ai.tool.ToolDef(
        audit_model,
        name="audit_model",
        description=_DESCRIPTION + listed,
        parameters=_PARAMETERS,
        parallel=False,
    ).as_tool()
