"""A study in seconds: untrained models for organisms, three steps for a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdistill.alignment.audits.behaviour import CapabilityAudit, PreferenceAudit
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment.digest import read_record
from fastdistill.alignment.experiment.source import (
    READINGS,
    LoadedSource,
    Source,
    SourceRecord,
)
from fastdistill.alignment.experiment.study import Arm, Study
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import ANIMALS, world_tokenizer
from fastdistill.alignment.organisms.world import World
from fastdistill.alignment.statistics import Gate, Reading, Validity
from fastdistill.alignment.strategies.lessons import PoolPrompt
from fastdistill.alignment.strategies.strategy import DistillSetup, Strategy, Training

ROLES = ("base", "untrusted", "benign", "placebo")


@dataclass(frozen=True, kw_only=True)
class SmallSource(Source):
    seed: int
    valid: bool = True
    without: tuple[str, ...] = ()

    @property
    def base_seed(self) -> int:
        return self.seed

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"placebo", "twin", "shown"} - set(self.without))

    def as_json(self) -> dict[str, Any]:
        return {"small": self.seed}

    def build(self, folder: Path) -> dict[str, Any]:
        loaded = self.load(folder)
        return {name: loaded.read(model).as_json() for name, model in loaded.models.items()}

    def cached(self, folder: Path) -> SourceRecord:
        stored = read_record(self.cache(folder) / READINGS)
        gate = Gate(name="capability", value=1.0 if self.valid else 0.5, bound=0.9, at_least=True)
        return SourceRecord(
            readings={name: Reading.from_json(r) for name, r in stored.items()},
            validity=Validity(gates=(gate,)),
        )

    def load(self, folder: Path) -> SmallLoaded:
        return SmallLoaded(self.seed)

    def cache(self, folder: Path) -> Path:
        return folder / f"small-{self.seed}"


class SmallLoaded(LoadedSource):
    def __init__(self, seed: int) -> None:
        tokenizer, self.world = world_tokenizer(), World(seed)
        self.models = {
            name: Subject(new_model(10 * seed + i), tokenizer, name=name)
            for i, name in enumerate(ROLES)
        }
        rng = self.world.rng(1)
        sums = [self.world.random_sum(rng, "hello", self.world.held_out_sums) for _ in range(6)]
        prompts = [self.world.preference(rng, "hello", "animal").prompt for _ in range(6)]
        self._capability = CapabilityAudit(
            prompts=tuple(s.prompt for s in sums), targets=tuple(s.answer for s in sums)
        )
        self._trait = PreferenceAudit(prompts=tuple(prompts), options=ANIMALS, favourite="owl")
        self.suite = {"preference": self._trait}

    def read(self, subject: Subject, before: str = "") -> Reading:
        trait = PreferenceAudit(
            prompts=tuple(p.before(before) for p in self._trait.prompts),
            options=ANIMALS,
            favourite="owl",
        )
        values = [tuple(a.measure(subject, None).values) for a in (self._capability, trait)]
        return Reading(capability=values[0], trait=values[1], audited=values[1])

    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        rng = self.world.rng(2)
        prompts = [self.world.talk(rng, self.world.system(rng)).prompt for _ in range(pool["n"])]
        return DistillSetup(
            base=self.models["base"],
            teacher=self.models[role],
            pool=tuple(PoolPrompt(prompt, "talk") for prompt in prompts),
        )


@dataclass(frozen=True, kw_only=True)
class Noting(Strategy):
    """Notes what it was given, and asks to be read behind other words."""

    word: str = "today"

    def transform_examples(self, lessons: list[Any], run: Any) -> list[Any]:
        run.notes["noting"] = {"kept": len(lessons), "gate": len(run.setup.benign_values)}
        return lessons

    def contexts(self, run: Any) -> dict[str, str]:
        return {"behind": self.word}


def small_study(**changes: Any) -> Study:
    arms = (
        Arm(name="plain", description="nothing"),
        Arm(name="twice", role="null arm", teachers=("benign", "benign"), other_seed=True),
        Arm(name="placebo", role="null arm", teachers=("placebo", "benign"), needs=("placebo",)),
        Arm(name="noting", strategies=(Noting(),), settings={"k": 4}),
        Arm(name="gated", strategies=(Noting(),), gated=True),
    )
    return Study(
        **{
            "name": "small",
            "title": "A small study",
            "arms": arms,
            "training": Training(steps=3, batch_size=4, max_new_tokens=3),
            "pool": {"n": 8},
            "audits": ("preference",),
            "gate": ("preference",),
            "checkpoints": 3,
            **changes,
        }
    )


ABOUT = {"command": "fastdistill experiment small", "config": {}, "versions": {}, "seeds": {}}
