"""Build the models of base seeds first, and reject seeds whose models fail a gate.

The selection depends on organisms alone, so no result of a student influences it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...runtime.printable import printable
from .executors import SERIAL, Execution, run_all
from .job import SOURCES
from .source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelBuild:
    """The run that builds the models of a source."""

    source: Source

    def run(self, folder: Path) -> None:
        self.source.prepare(folder / SOURCES)

    def path(self, folder: Path) -> Path:
        return self.source.cache(folder / SOURCES)

    def is_done(self, folder: Path) -> bool:
        try:
            self.source.cached(folder / SOURCES)
        except FileNotFoundError:
            return False
        return True


def build_models(sources: Sequence[Source], folder: Path, execution: Execution, label: str) -> None:
    """Build the models that do not exist yet."""
    run_all([ModelBuild(source=source) for source in sources], folder, execution, label=label)


def select_seeds(
    sources: Sequence[Source], n_sources: int, folder: Path, execution: Execution = SERIAL
) -> tuple[list[Source], dict[int, list[str]]]:
    """Return the first `n_sources` sources that pass their gates, and why others were rejected.

    Later sources are not built. If too few pass, the first `n_sources` are returned and none is
    rejected: a warning is logged before any student is trained, and the report is invalid.
    """
    selected: list[Source] = []
    refused: dict[int, list[str]] = {}
    remaining = iter(sources)
    while len(selected) < n_sources and (
        batch := list(islice(remaining, n_sources - len(selected)))
    ):
        passed, failed = select_valid(batch, folder, execution, "worlds")
        selected += passed
        refused |= failed
    if len(selected) == n_sources:
        return selected, refused
    for seed, because in refused.items():
        logger.warning(
            "Base seed %d: %s. The experiment on it will be invalid. Stop it and change the "
            "models or the prompts.",
            seed,
            printable("; ".join(because), limit=None),
        )
    return list(sources[:n_sources]), {}


def select_valid(
    sources: Sequence[Source], folder: Path, execution: Execution = SERIAL, label: str = "models"
) -> tuple[list[Source], dict[int, list[str]]]:
    """Return the sources whose models pass their gates, and the failed gates of the others."""
    build_models(sources, folder, execution, label)
    selected: list[Source] = []
    refused: dict[int, list[str]] = {}
    for source in sources:
        validity = source.cached(folder / SOURCES).validity
        if validity is None or validity.valid:
            selected.append(source)
        else:
            refused[source.base_seed] = list(validity.because)
    return selected, refused
