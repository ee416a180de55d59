"""`fastdistill plan`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..plan import Plan as Planned
from ..plan import plan_memory, print_plan
from .opening import silence_transformers
from .verbs import Plan


def run(options: Plan, extra: dict[str, Any]) -> Planned:
    silence_transformers()
    return plan_memory(**vars(options))


def as_json(plan: Planned) -> dict[str, Any]:
    return plan.as_json()


def print_result(plan: Planned) -> None:
    print_plan(plan, Console())
