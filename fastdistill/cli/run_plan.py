"""`fastdistill plan`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..plan import Plan as Planned
from ..plan import plan_memory, print_plan
from .opening import quiet
from .verbs import Plan


def run(own: Plan, more: dict[str, Any]) -> Planned:
    quiet()
    return plan_memory(**vars(own))


def as_json(found: Planned) -> dict[str, Any]:
    return found.as_json()


def tell(found: Planned) -> None:
    print_plan(found, Console())
