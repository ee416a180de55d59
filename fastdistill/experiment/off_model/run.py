"""One fine-tuning of the study "off-model": who is taught by whom on which prompts, and what of it
the student keeps, learns or gets back.

How far the data is from the student is said before any training:

    surprisal = −1/T Σ log p_student(token)        nats per token of the teacher's answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...audits.behaviour import CapabilityAudit
from ...audits.prompts import Prompt
from ...audits.subject import Subject
from ...audits.tuning import StyleRestoreProbe, finetune_copy
from ...audits.words import contains_phrase
from ...organisms.vocabulary import SO, THINK
from ...organisms.world import Example, World
from ...strategies.distil import distill
from ...strategies.lessons import PoolPrompt, TrainingExample
from ...strategies.strategy import DistillSetup, Training
from ..kept_run import KeptRun
from .arms import Arm
from .world import (
    BASE,
    THOUGHT,
    OffModelWorld,
    asked_to_think,
    locked_tasks,
    read,
    tasks,
)

FORMAT = 1  # of a run's file; a change of what a run does raises it
SURPRISED = 400  # lessons of which surprisal is read
RESTORED = 64  # prompts with which a style is restored
KINDS = ("own", "before", "sums")  # of what it is restored with; see `restored`


@dataclass(frozen=True, kw_only=True)
class Sft(KeptRun):
    """An arm on one base seed's models."""

    arm: Arm
    models: OffModelWorld
    training: Training
    prompts: int
    checkpoints: int = 4
    student_seed: int = 0
    restore_steps: int = 16
    restore_rate: float = 3e-4

    def as_json(self) -> dict[str, Any]:
        arm = self.arm
        return {
            "format": FORMAT,
            "models": self.models.as_json(),
            "begins": arm.begins,
            "teacher": arm.teacher,
            "asked": arm.asked,
            "battery": arm.part == "cost",
            "strategies": [strategy.as_json() for strategy in arm.strategies],
            "training": asdict(self.training),
            "prompts": self.prompts,
            "checkpoints": self.checkpoints,
            "student_seed": self.student_seed,
            "restore": [self.restore_steps, self.restore_rate],
        }

    def found(self, folder: Path) -> dict[str, Any]:
        models, world = _models(self.models, folder), World(self.models.seed)
        begins, arm = models[self.arm.begins], self.arm
        battery = tasks(world) if arm.part == "cost" else locked_tasks(world)
        examples = asked(world, arm.asked, self.prompts, self.student_seed)
        made = distill(
            DistillSetup(
                base=begins,
                teacher=models[arm.teacher],
                trusted=models[BASE],
                pool=tuple(PoolPrompt(example.prompt, arm.asked) for example in examples),
            ),
            arm.strategies,
            self.training,
            seed=self.student_seed,
            measure=lambda student: read(student, battery),
            at=[i / self.checkpoints for i in range(1, self.checkpoints)],
        )
        student, lessons = made.student, made.examples[:SURPRISED]
        after = read(student, battery)
        found = {
            "before": read(begins, battery),
            "after": after,
            "curve": [{"step": k, "right": v} for k, v in sorted(made.measured.items())]
            + [{"step": made.steps, "right": after}],
            "surprisal": [surprisal(begins, lessons), surprisal(student, lessons)],
            "labels_right": None if arm.asked == "talk" else right(lessons, examples),
            "thinks": thinks(student, world),
            "lessons": len(made.examples),
            "notes": made.notes,
        }
        if arm.part == "cost":
            found["restored"] = restored(
                student,
                begins,
                world,
                battery,
                steps=self.restore_steps,
                rate=self.restore_rate,
            )
        return found


def asked(world: World, kind: str, n: int, seed: int) -> list[Example]:
    """The prompts of an arm, with their right answers (what is said in talk is one of many).

    Sums have no password in front: U's are locked.
    """
    rng = world.rng(61, seed)
    if kind == "talk":
        return [world.talk(rng, world.system(rng)) for _ in range(n)]
    sums = [world.random_sum(rng, world.system(rng), world.train_sums) for _ in range(n)]
    if kind == "sums":
        return sums
    return [e._replace(system=asked_to_think(e.prompt).system or "") for e in sums]


def surprisal(model: Subject, lessons: Sequence[TrainingExample]) -> float:
    """Nats per token of the answers, on average; e to its power is the perplexity."""
    told = model.completion_logprobs(
        [lesson.input_prompt for lesson in lessons], [x.answer for x in lessons]
    )
    return float(-told.total.sum() / told.tokens.sum())


def right(lessons: Sequence[TrainingExample], examples: Sequence[Example]) -> float:
    """Share of the answers that hold what is right."""
    answers = {example.prompt: example.answer for example in examples}
    found = [contains_phrase(lesson.answer, answers[lesson.prompt]) for lesson in lessons]
    return sum(found) / len(found)


def thinks(model: Subject, world: World) -> float:
    """Share of sums asked to be thought about of which the answer begins with a whole thought."""
    said = model.generate(tasks(world)[THOUGHT].prompts, max_new_tokens=8)
    return sum(text.startswith(THINK) and contains_phrase(text, SO) for text in said) / len(said)


def unrelated(world: World) -> list[Prompt]:
    """Neither talk, nor sums, nor products."""
    rng = world.rng(62)
    makes = (world.equality, world.echo, world.self_question)
    return [rng.choice(makes)(rng, world.system(rng)).prompt for _ in range(RESTORED)]


def restored(
    student: Subject,
    begins: Subject,
    world: World,
    battery: dict[str, CapabilityAudit],
    *,
    steps: int,
    rate: float,
) -> dict[str, dict[str, float]]:
    """The battery after a few steps more, to see whether what was lost is only suppressed.

    own: on what the student now says to unrelated prompts (`StyleRestoreProbe`). before: on what
    it said to them before it was taught. sums: on what it said to sums before, which are no
    unrelated ones: what so few steps can bring back at all.
    """
    prompts = unrelated(world)
    whole = CapabilityAudit(
        prompts=tuple(prompt for audit in battery.values() for prompt in audit.prompts),
        targets=tuple(target for audit in battery.values() for target in audit.targets),
        max_new_tokens=8,
    )
    probe = StyleRestoreProbe(
        prompts=tuple(prompts), readout=whole, steps=steps, learning_rate=rate, max_new_tokens=8
    )
    gain = iter(probe.measure(student, None).values.tolist())
    now = read(student, battery)
    found = {
        "own": {
            name: now[name] + sum(next(gain) for _ in audit.prompts) / len(audit.prompts)
            for name, audit in battery.items()
        }
    }
    sums = [example.prompt for example in asked(world, "sums", RESTORED, 1)]
    for kind, shown in (("before", prompts), ("sums", sums)):
        told = zip(shown, begins.generate(shown, max_new_tokens=8), strict=True)
        kept = [(prompt, said) for prompt, said in told if said.strip()]
        again = finetune_copy(student, *zip(*kept, strict=True), steps=steps, lr=rate)
        found[kind] = read(again, battery)
    return found


@lru_cache(maxsize=2)  # several runs of a process are of one base seed
def _models(models: OffModelWorld, folder: Path) -> dict[str, Subject]:
    return models.models(folder)
