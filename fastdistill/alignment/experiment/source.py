"""Sources of an experiment's models and prompts: a synthetic world or checkpoints.

    base M · untrusted teacher U · its benign twin B · placebo P

A source is described in JSON (`as_json`), which is part of a run's digest. Each process loads it
when needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..audits.audit import Audit
from ..audits.subject import Subject
from ..organisms.storage import load_organism
from ..statistics import Reading, Validity
from ..strategies.lessons import Examples
from ..strategies.strategy import DistillSetup
from .digest import read_record, write_record

READINGS = "readings.json"
MODELS = ("base", "untrusted", "benign", "placebo")


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The cached evaluation of a source's models.

    Attributes:
        readings: by role, item by item.
        validity: gates of the organisms; for checkpoints, whether the denominators of C and τ are
            above 0; None without gates.
    """

    readings: dict[str, Reading]
    validity: Validity | None


def load_models(cache: Path, roles: Sequence[str]) -> dict[str, Subject]:
    """Return the models of a cache by role; they have one tokenizer and share encoded prompts."""
    models = {role: load_organism(cache / role, name=role) for role in roles}
    first = models[roles[0]]
    return {role: first.with_model(subject.model, role) for role, subject in models.items()}


def named_audited(suite: Mapping[str, Audit]) -> dict[str, Audit]:
    """Return the audits with ", audited" after their names: they ask in the audited context."""
    return {f"{name}, audited": audit for name, audit in suite.items()}


class LoadedSource(ABC):
    """A source in memory: models by role and audits by name."""

    models: dict[str, Subject]
    suite: dict[str, Audit]

    @abstractmethod
    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        """Return the setup to distill the teacher of a role on a pool with these settings."""

    @abstractmethod
    def read(self, subject: Subject, before: str = "") -> Reading:
        """Return capability, trait and audited trait, with a prefix before every trait prompt."""

    def read_contexts(self, subject: Subject) -> dict[str, float]:
        """Return the mean trait in further contexts, by name."""
        return {}

    def notes_on(self, examples: Examples) -> dict[str, Any]:
        """Return what to note about the examples of a student."""
        return {}


class Source(ABC):
    """The models and prompts of one base seed."""

    is_slow: ClassVar[bool] = False  # whether a study says first how long it will take

    @property
    @abstractmethod
    def base_seed(self) -> int: ...

    @property
    @abstractmethod
    def features(self) -> frozenset[str]:
        """Features that arms may require: a placebo, kinds of prompts, an eliciting instruction."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]: ...

    @abstractmethod
    def cache(self, folder: Path) -> Path:
        """Return where in the folder the models and readings of this source are cached."""

    @abstractmethod
    def build(self, folder: Path) -> dict[str, Any]:
        """Build and evaluate the models, and return the record to cache."""

    def prepare(self, folder: Path) -> None:
        """Build and evaluate the models once, and cache them in the folder."""
        path = self.cache(folder) / READINGS  # written last: a source with this file is complete
        if not path.is_file():
            write_record(path, self.build(folder))

    def cached(self, folder: Path) -> SourceRecord:
        """Return the cached evaluation; FileNotFoundError if `prepare` has not run."""
        record = read_record(self.cache(folder) / READINGS, "readings", "validity")
        return SourceRecord(
            readings={name: Reading.from_json(r) for name, r in record["readings"].items()},
            validity=Validity.from_json(record["validity"]),
        )

    @abstractmethod
    def load(self, folder: Path) -> LoadedSource: ...
