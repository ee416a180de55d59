"""`fastdistill plan`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.console import Console

from ..training.plan import Plan as Planned
from ..training.plan import Settings, plan_memory, print_plan
from .verbs import Plan


def run(options: Plan, extra: dict[str, Any]) -> Planned:
    values = dict(vars(options))
    settings = Settings(**{field.name: values.pop(field.name) for field in fields(Settings)})
    return plan_memory(**values, settings=settings)


def print_result(plan: Planned) -> None:
    print_plan(plan, Console())
