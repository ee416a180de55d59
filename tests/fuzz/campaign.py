"""Runs a reader on many changed files and counts what becomes of them."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mutation import OUTSIDE, mutate
from .oracle import Failure, Oracle
from .targets import Target

_MEMORY = Path("/dev/shm")  # a folder that is no disk


@dataclass
class Result:
    """What became of the inputs. failures: {(kind, place): (times, the first text, its input)}."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str], tuple[int, str, bytes]] = field(default_factory=dict)
    slowest: float = 0.0
    seconds: float = 0.0  # of CPU time

    def add(self, outcome: str, failure: Failure | None, data: bytes) -> None:
        self.outcomes["failure" if failure else outcome] += 1
        if failure is not None:
            times, text, first = self.failures.get(failure[:2], (0, failure.text, data))
            self.failures[failure[:2]] = (times + 1, text, first)

    @property
    def inputs(self) -> int:
        return sum(self.outcomes.values())


class Campaign:
    """A target and the folder in which it reads.

    An input is two bytes that choose a file of the seeds, and the content of that file.
    """

    def __init__(self, target: Target, oracle: Oracle | None = None) -> None:
        parent = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))
        tempfile.tempdir = str(self.root / "in" / "tmp")  # where readers put temporary files
        Path(tempfile.tempdir).mkdir(parents=True)
        self.folder = self.root / "in" / "folder"
        self.target, self.result = target, Result()
        self.seeds = target.seeds(self.root / "seeds")
        self.places = target.places(self.seeds)
        outside = self.folder.parent / OUTSIDE.removeprefix("../")
        outside.parent.mkdir(parents=True)
        outside.write_bytes(b"\x0a\0\0\0\0\0\0\0{}        ")
        self.oracle = oracle or Oracle(self.root / "in")
        self.oracle.folder = os.path.realpath(self.root / "in")
        self._seed: int | None = None
        self._left: str | None = None
        self.error: BaseException | None = None  # of the last input

    def inputs(self) -> list[bytes]:
        """Return the unchanged files as inputs."""
        return [
            number.to_bytes(2, "little") + self.seeds[seed][name]
            for number, (seed, name) in enumerate(self.places)
        ]

    def change(self, data: bytes, rng: random.Random) -> bytes:
        """Return a changed input."""
        if rng.random() < 0.05 or len(data) < 2:
            data = rng.choice(self.inputs())
        number = int.from_bytes(data[:2], "little") % len(self.places)
        return data[:2] + mutate(self.places[number][1], data[2:], rng)

    def try_one(self, data: bytes) -> Failure | None:
        """Read the folder of an input, and count the outcome."""
        start = time.process_time()
        number = int.from_bytes(data[:2], "little") % len(self.places)
        seed, name = self.places[number]
        self._restore(seed)
        self._write(name, data[2:])
        self._left = name
        self.target.repair(self.folder)
        outcome, failure = self.oracle.check(lambda: self.target.read(self.folder))
        self.error = self.oracle.error
        self.result.add(outcome, failure, data)
        self.result.slowest = self.oracle.slowest
        self.result.seconds += time.process_time() - start
        return failure

    def run(self, count: int, seed: int, stop: Any = lambda: False) -> Result:
        """Try the seeds and then `count` inputs that follow from `seed` alone."""
        originals = self.inputs()
        for data in originals:
            self.try_one(data)
            if self.error is not None:
                raise self.error
        for at in range(count):
            if stop():
                break
            rng = random.Random(f"{seed} {at}")
            self.try_one(self.change(rng.choice(originals), rng))
        return self.result

    def close(self) -> None:
        tempfile.tempdir = None
        shutil.rmtree(self.root)

    def _restore(self, seed: int) -> None:
        """Put the files of a seed into the folder, with as few writes as possible."""
        if seed != self._seed or self.target.repair is not Target.repair:
            shutil.rmtree(self.folder, ignore_errors=True)
            for name, content in self.seeds[seed].items():
                self._write(name, content)
            self._seed = seed
            return
        files = self.seeds[seed]
        for at, folders, names in os.walk(self.folder):
            for name in names:
                path = os.path.relpath(os.path.join(at, name), self.folder)
                if path not in files:
                    os.unlink(os.path.join(at, name))
            folders[:] = [f for f in folders if f != "__pycache__"]
        if self._left is not None and self._left in files:
            self._write(self._left, files[self._left])

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an earlier reader may still map the old file
        path.write_bytes(content)
