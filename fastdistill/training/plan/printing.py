"""Prints a plan on a terminal, in less than a page."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from .shapes import Shapes
from .sizes import in_gb
from .types import Memory, Plan


def print_plan(plan: Plan, console: Any) -> None:
    """Print a plan in at most 40 lines of 80 columns."""
    _print_line(console, _model("student", plan.student))
    if plan.teacher is not None:
        _print_line(console, _model("teacher", plan.teacher))
    console.print(_parts(plan))
    console.print(_phases(plan.memory))
    text = " · ".join(f"{name} {in_gb(size)}" for name, size in plan.activations.items())
    _print_line(console, f"activations: {text}")
    if plan.teacher_weights:
        text = " · ".join(f"{name} {in_gb(size)}" for name, size in plan.teacher_weights.items())
        _print_line(console, f"teacher: {text}")
    if plan.cache_per_token is not None:
        whole = "" if plan.cache is None else f", {in_gb(plan.cache)} in all"
        _print_line(console, f"cache on disk: {plan.cache_per_token} bytes per token{whole}")
    if plan.seconds is not None:
        _print_line(
            console, f"time of one epoch at this throughput: {plan.seconds / 3600:.1f} hours"
        )
    for line in plan.assumptions:
        console.print(f"[dim]assumed: {escape(line)}[/dim]", highlight=False)
    if plan.proposal is not None and plan.card is not None:
        _verdict(plan, console)


def _verdict(plan: Plan, console: Any) -> None:
    proposal, card = plan.proposal, plan.card
    assert proposal is not None
    assert card is not None
    taken = ", ".join(proposal.measures)
    if proposal.missing:
        tried = f" with {taken}" if taken else ""
        largest = proposal.memory.largest
        console.print(
            f"[red]does not fit {in_gb(card)}[/red]: {in_gb(proposal.missing)} are missing "
            f"even{tried}; the largest part is {largest.name}, {in_gb(largest.bytes)}",
            highlight=False,
        )
        return
    suffix = f"with {taken}" if taken else "without changes"
    console.print(
        f"[green]fits {in_gb(card)}[/green] {suffix}: {in_gb(proposal.memory.needed)} needed",
        highlight=False,
    )
    # Two spaces separate settings, so that a line break never splits one.
    _print_line(console, "  ".join(proposal.memory.settings.lines()))


def _print_line(console: Any, line: str) -> None:
    console.print(escape(line), highlight=False)


def _model(role: str, shapes: Shapes) -> str:
    head = "tied" if shapes.tied else _count(shapes.head)
    return (
        f"{role}: {shapes.model_type}, {shapes.layers} layers, {_count(shapes.total)} (body "
        f"{_count(shapes.body)}, embedding {_count(shapes.embeddings)}, head {head})"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    table.add_column("memory", justify="right")
    return table


def _parts(plan: Plan) -> Table:
    table = _table("part")
    table.add_column("how", style="dim")
    for part in plan.memory.parts:
        table.add_row(part.name, in_gb(part.bytes), part.how)
    return table


def _phases(memory: Memory) -> Table:
    """Return a table of the memory at the peak of each phase; the largest is in bold."""
    table = _table("at the peak of")
    for phase in memory.phases:
        style = "bold" if phase.bytes == memory.peak else ""
        table.add_row(phase.name, in_gb(phase.bytes), style=style)
    if memory.allowance:
        table.add_row("CUDA context, fragmentation", in_gb(memory.allowance))
    return table
