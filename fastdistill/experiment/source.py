"""Where an experiment's models and prompts come from: a synthetic world, or checkpoints.

    base M · untrusted U · benign B, its twin · placebo P

A source is said in JSON (`as_json`), so that a run can be told from another by its digest, and is
opened in the process that needs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audits.audit import Audit
from ..audits.subject import Subject
from ..statistics import Reading, Validity
from ..strategies.strategy import DistillSetup

MODELS = ("base", "untrusted", "benign", "placebo")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is known of a source's models once they were measured.

    readings: by role, item by item. validity: of the organisms; of checkpoints, whether C and τ
    have a denominator. None where nothing was gated.
    """

    readings: dict[str, Reading]
    validity: Validity | None


class Opened(ABC):
    """A source in memory: its models by role, and its audits by name."""

    models: dict[str, Subject]
    suite: dict[str, Audit]

    @abstractmethod
    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        """What there is to distil the teacher of a role with, on a pool of these settings."""

    @abstractmethod
    def read(self, subject: Subject, before: str = "") -> Reading:
        """Capability, trait and audited trait, with words in front of every prompt about it."""


class Source(ABC):
    """See above."""

    @property
    @abstractmethod
    def base_seed(self) -> int: ...

    @property
    @abstractmethod
    def has(self) -> frozenset[str]:
        """What arms may need: a placebo, kinds of prompts, an eliciting instruction."""

    @abstractmethod
    def as_json(self) -> dict[str, Any]: ...

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """What takes long and every run of this source needs, once, into the folder."""

    @abstractmethod
    def kept(self, folder: Path) -> Kept:
        """FileNotFoundError where nothing was prepared."""

    @abstractmethod
    def opened(self, folder: Path) -> Opened: ...
