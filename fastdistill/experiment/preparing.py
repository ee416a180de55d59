"""The models of base seeds, made before any student is, and those seeds refused whose miss a gate.

Which seeds are refused depends on organisms alone, so that no result of a student chooses seeds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..runtime.printable import printable
from .executors import do
from .job import SOURCES
from .source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The models of a source, as something to be done before its runs."""

    source: Source

    def run(self, folder: Path) -> None:
        self.source.prepare(folder / SOURCES)

    def done(self, folder: Path) -> bool:
        try:
            self.source.kept(folder / SOURCES)
        except FileNotFoundError:
            return False
        return True


def prepared(sources: Sequence[Source], folder: Path, what: str, **how: Any) -> None:
    """Make what is not there yet."""
    do([Prepared(source=source) for source in sources], folder, what=what, **how)


def chosen(
    sources: Sequence[Source], wanted: int, folder: Path, **how: Any
) -> tuple[list[Source], dict[int, list[str]]]:
    """The first `wanted` sources whose organisms pass their gates, and why others were refused.

    Sources behind them are not made. Where too few pass, the first `wanted` whatever they are, and
    nobody is refused: a warning says so before any student is trained, and so does their report,
    which is invalid.
    """
    kept: list[Source] = []
    refused: dict[int, list[str]] = {}
    rest = iter(sources)
    while len(kept) < wanted and (some := list(islice(rest, wanted - len(kept)))):
        prepared(some, folder, "worlds", **how)
        for source in some:
            validity = source.kept(folder / SOURCES).validity
            if validity is None or validity.valid:
                kept.append(source)
            else:
                refused[source.base_seed] = list(validity.because)
    if len(kept) == wanted:
        return kept, refused
    for seed, because in refused.items():
        logger.warning(
            "Base seed %d: %s. The experiment on it will be invalid: stop it now, and change "
            "the models or the prompts.",
            *(seed, printable("; ".join(because), limit=None)),
        )
    return list(sources[:wanted]), {}
