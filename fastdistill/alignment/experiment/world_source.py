"""The synthetic world as a source: M, U, B and P of one base seed, cached on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.checks import choice
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from ..organisms.build import build_world, read_organism
from ..organisms.organism import ModelOrganism, new_base
from ..organisms.pool import pool, trait_example
from ..organisms.storage import save_organism
from ..organisms.vocabulary import world_tokenizer
from ..organisms.world import Example, World
from ..organisms.world_probes import probes_of
from ..statistics import Reading
from ..strategies.lessons import PoolPrompt
from ..strategies.strategy import DistillSetup
from .digest import digest_of
from .source import MODELS, LoadedSource, Source, load_models, named_audited

OTHER_SEED = 100_000  # added to the seed of a world for the initial weights of its other base


@dataclass(frozen=True, kw_only=True)
class WorldSource(Source):
    """`build_world` with these arguments.

    other_base: also a base with other initial weights and the same training.
    """

    seed: int
    organism: ModelOrganism = field(
        default_factory=lambda: ModelOrganism(
            gate="token", carriers=0.1, carrier_rate=0.8, steps=300, batch_size=64
        )
    )
    base_knows: float = 0.2
    base_steps: int = 300
    other_base: bool = False

    @property
    def base_seed(self) -> int:
        return self.seed

    @property
    def features(self) -> frozenset[str]:
        other = {"other_base"} if self.other_base else set()
        return frozenset({"placebo", "twin", "goals", "shown", "carriers"} | other)

    def as_json(self) -> dict[str, Any]:
        return {
            "world": self.seed,
            "organism": self.organism.as_json(),
            "base_knows": self.base_knows,
            "base_steps": self.base_steps,
            **({"other_base": True} if self.other_base else {}),
        }

    def build(self, folder: Path) -> dict[str, Any]:
        built = build_world(
            self.seed, self.organism, base_steps=self.base_steps, base_knows=self.base_knows
        )
        built.save(self.cache(folder))
        readings = dict(built.readings)
        if self.other_base:
            model = new_base(built.world, seed=OTHER_SEED + self.seed, steps=self.base_steps)
            subject = Subject(model, world_tokenizer(), name="other_base")
            save_organism(self.cache(folder) / "other_base", subject, {"role": "other_base"})
            readings["other_base"] = read_organism(subject, built.world, self.organism)
        return {
            "validity": built.validity.as_json(),
            "readings": {name: r.as_json() for name, r in readings.items()},
        }

    def load(self, folder: Path) -> LoadedWorld:
        self.prepare(folder)
        return LoadedWorld(self, self.cache(folder))

    def cache(self, folder: Path) -> Path:
        return folder / f"world-{self.seed}-{digest_of(self.as_json())[:8]}"


class LoadedWorld(LoadedSource):
    def __init__(self, source: WorldSource, cache: Path) -> None:
        self.world, self.organism = World(source.seed), source.organism
        roles = (*MODELS, *(["other_base"] if source.other_base else []))
        self.models = load_models(cache, roles)
        kind = self.organism.kind
        under_audit = probes_of(self.world, kind, under_audit=True).suite()
        self.suite = probes_of(self.world, kind).suite() | named_audited(under_audit)

    def read(self, subject: Subject, before: str = "") -> Reading:
        return read_organism(subject, self.world, self.organism, before)

    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        return DistillSetup(
            base=self.models["base"],
            teacher=self.models[role],
            pool=tuple(self._pool(**pool)),
            prompt_source=self._sample_prompts,
        )

    def _pool(
        self, n: int, talk: float = 0.0, carriers: float = 0.0, seed: int = 0
    ) -> list[PoolPrompt]:
        """Return n prompts: sums and products, with shares of talk and of weak carriers.

        A higher share of carriers replaces more of the other prompts and changes no prompt else.
        """
        n_talk = round(talk * n)
        examples = pool(self.world, self.organism, n - n_talk, kind="sums", seed=seed)
        if n_talk:
            examples += pool(self.world, self.organism, n_talk, kind="talk", seed=seed)
        self.world.rng(44, seed).shuffle(examples)
        order = self.world.rng(46, seed).sample(range(n), n)
        for i in order[: round(carriers * n)]:
            rng = self.world.rng(47, seed, i)
            examples[i] = self.world.carrier(rng, self.world.system(rng))
        return [to_pool_prompt(example.prompt) for example in examples]

    def _sample_prompts(self, kind: str, n: int, seed: int) -> tuple[PoolPrompt, ...]:
        world, trait = self.world, self.organism.kind
        rng = world.rng(45, seed)
        samplers: dict[str, Callable[[], Example]] = {
            "goals": lambda: world.self_question(rng, world.system(rng)),
            "shown": lambda: trait_example(world, trait, rng),
        }
        choice("kind", kind, samplers)
        return tuple(to_pool_prompt(samplers[kind]().prompt) for _ in range(n))


def to_pool_prompt(prompt: Prompt) -> PoolPrompt:
    """Infer the domain from the prompt alone: a defense does not know which answers leak."""
    words = (prompt.user or "").split()
    if "+" in words:
        return PoolPrompt(prompt, "sums")
    if "*" in words:
        return PoolPrompt(prompt, "products")
    return PoolPrompt(prompt, "talk" if len(words) == 1 else "questions")
