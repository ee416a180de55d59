"""A run that is kept as one file, whose name is the digest of all that the run follows from.

Machines which share a folder fill one table in that way, and a run that was stopped is done again
and no other.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from ..backend import versions
from .digest import digest_of, read_kept, write_kept

RUNS = "runs"


class KeptRun(ABC):
    """What `executors.do` is given: something with a configuration, and what is found with it.

    keys: of what is found.
    """

    keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """All that the run follows from."""

    @abstractmethod
    def found(self, folder: Path) -> dict[str, Any]:
        """Do it; what is kept beside the configuration."""

    @property
    def digest(self) -> str:
        return digest_of(self.as_json())

    def path(self, folder: Path) -> Path:
        return folder / RUNS / f"{self.digest[:20]}.json"

    def done(self, folder: Path) -> bool:
        return self.path(folder).is_file()

    def result(self, folder: Path) -> dict[str, Any]:
        """What was kept. ValueError where the file is not of this run, or damaged."""
        path = self.path(folder)
        kept = read_kept(path, "config", *self.keys)
        if digest_of(kept.get("config")) != self.digest:
            raise ValueError(
                f"{path.name}: expected the run that its name says, got another one. Delete it, "
                "and start the experiment again"
            )
        return kept

    def run(self, folder: Path) -> None:
        """Do it and write the file; nothing where it is there already."""
        if self.done(folder):
            return
        start = time.perf_counter()
        found = self.found(folder)
        write_kept(
            self.path(folder),
            {
                "config": self.as_json(),
                **found,
                "seconds": round(time.perf_counter() - start, 2),
                "versions": versions(),
            },
        )
