"""`fastdistill demo`: on small models, or on SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.checks import choice, fail
from .loaders import silence_transformers

_OF_SMOLLM2 = ("seeds", "steps")


def run(
    model: str | None, out: Path, options: dict[str, Any]
) -> tuple[Any, Callable[[Any, Any], None]]:
    """Run the demo; return its result and the function that prints it."""
    choice("model", model, (None, "smollm2"))
    if model is None:
        from ..alignment.experiment.demo.report import print_table
        from ..alignment.experiment.demo.run import run_demo

        return run_demo(out=out, **options), print_table
    for name, value in options.items():
        if name not in _OF_SMOLLM2:
            fail(name, "no value with model smollm2", value, "it takes --seeds and --steps")
    from ..alignment.experiment.demo.smollm2.demo import run_comparison
    from ..alignment.experiment.demo.smollm2.report import print_comparison

    silence_transformers()
    return run_comparison(out=out, **options), print_comparison
