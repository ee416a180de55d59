"""A run cached as one file, whose name is the digest of the run's configuration.

Machines that share a folder therefore share results, and an experiment repeats only the runs that
did not finish.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.backend import versions
from .digest import digest_of, read_record, write_record

RUNS = "runs"


class CachedRun(ABC):
    """A run for `executors.run_all`, with a configuration and a result.

    Attributes:
        keys: required keys of the result.
    """

    keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """Return the complete configuration of the run."""

    @abstractmethod
    def compute(self, folder: Path) -> dict[str, Any]:
        """Execute the run and return its result."""

    @property
    def digest(self) -> str:
        return digest_of(self.as_json())

    def path(self, folder: Path) -> Path:
        return folder / RUNS / f"{self.digest[:20]}.json"

    def is_done(self, folder: Path) -> bool:
        return self.path(folder).is_file()

    def result(self, folder: Path) -> dict[str, Any]:
        """Return the cached record; ValueError if it is damaged or of another run."""
        path = self.path(folder)
        record = read_record(path, "config", *self.keys)
        if digest_of(record.get("config")) != self.digest:
            raise ValueError(
                f"{path.name}: expected the run with this digest, got another run. Delete the "
                "file and restart the experiment"
            )
        return record

    def run(self, folder: Path) -> None:
        """Execute the run and write its record, unless it exists."""
        if self.is_done(folder):
            return
        start = time.perf_counter()
        result = self.compute(folder)
        write_record(
            self.path(folder),
            {
                "config": self.as_json(),
                **result,
                "seconds": round(time.perf_counter() - start, 2),
                "versions": versions(),
            },
        )
