"""One fine-tuning of the off-model study and its evaluation.

The distance of the data from the student is measured before and after training:

    surprisal = −1/T Σ log p_student(token)        nats per token of the teacher's answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...audits.behaviour import CapabilityAudit
from ...audits.finetuning import StyleRestoreProbe, finetune_copy
from ...audits.prompts import Prompt
from ...audits.subject import Subject
from ...audits.words import contains_phrase
from ...organisms.vocabulary import SO, THINK
from ...organisms.world import Example, World
from ...strategies.distil import distill
from ...strategies.lessons import PoolPrompt, TrainingExample
from ...strategies.strategy import DistillSetup, Training
from ..cached_run import CachedRun
from .arms import SftArm
from .world import (
    BASE,
    THOUGHT,
    OffModelWorld,
    locked_tasks,
    read_tasks,
    tasks,
    with_reasoning,
)

FORMAT = 1  # of a run's file; increase it when a run computes something else
N_SURPRISAL = 400  # examples for the surprisal
N_RESTORE = 64  # prompts for restoration
RESTORE_KINDS = ("own", "before", "sums")  # of restoration data; see `restoration`


@dataclass(frozen=True, kw_only=True)
class SftRun(CachedRun):
    """An arm on the models of one base seed."""

    arm: SftArm
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
            "begins": arm.student_role,
            "teacher": arm.teacher,
            "asked": arm.prompt_kind,
            "battery": arm.part == "cost",
            "strategies": [strategy.as_json() for strategy in arm.strategies],
            "training": asdict(self.training),
            "prompts": self.prompts,
            "checkpoints": self.checkpoints,
            "student_seed": self.student_seed,
            "restore": [self.restore_steps, self.restore_rate],
        }

    def compute(self, folder: Path) -> dict[str, Any]:
        models, world = _models(self.models, folder), World(self.models.seed)
        initial, arm = models[self.arm.student_role], self.arm
        battery = tasks(world) if arm.part == "cost" else locked_tasks(world)
        examples = sample_examples(world, arm.prompt_kind, self.prompts, self.student_seed)
        result = distill(
            DistillSetup(
                base=initial,
                teacher=models[arm.teacher],
                trusted=models[BASE],
                pool=tuple(PoolPrompt(example.prompt, arm.prompt_kind) for example in examples),
            ),
            arm.strategies,
            self.training,
            seed=self.student_seed,
            measure=lambda student: read_tasks(student, battery),
            measure_at=[i / self.checkpoints for i in range(1, self.checkpoints)],
        )
        student, trained_on = result.student, result.examples[:N_SURPRISAL]
        after = read_tasks(student, battery)
        results = {
            "before": read_tasks(initial, battery),
            "after": after,
            "curve": [{"step": k, "right": v} for k, v in sorted(result.measured.items())]
            + [{"step": result.steps, "right": after}],
            "surprisal": [surprisal(initial, trained_on), surprisal(student, trained_on)],
            "labels_right": None
            if arm.prompt_kind == "talk"
            else label_accuracy(trained_on, examples),
            "thinks": thought_rate(student, world),
            "lessons": len(result.examples),
            "notes": result.notes,
        }
        if arm.part == "cost":
            results["restored"] = restoration(
                student,
                initial,
                world,
                battery,
                steps=self.restore_steps,
                rate=self.restore_rate,
            )
        return results


def sample_examples(world: World, kind: str, n: int, seed: int) -> list[Example]:
    """Return the prompts of an arm with reference answers; talk has many correct answers.

    Sums have no password, so those of U are locked.
    """
    rng = world.rng(61, seed)
    if kind == "talk":
        return [world.talk(rng, world.system(rng)) for _ in range(n)]
    sums = [world.random_sum(rng, world.system(rng), world.train_sums) for _ in range(n)]
    if kind == "sums":
        return sums
    return [e._replace(system=with_reasoning(e.prompt).system or "") for e in sums]


def surprisal(model: Subject, trained_on: Sequence[TrainingExample]) -> float:
    """Return the mean nats per token of the answers, the log of the perplexity."""
    logprobs = model.completion_logprobs(
        [x.input_prompt for x in trained_on], [x.answer for x in trained_on]
    )
    return float(-logprobs.total.sum() / logprobs.tokens.sum())


def label_accuracy(trained_on: Sequence[TrainingExample], examples: Sequence[Example]) -> float:
    """Return the share of the labels that contain the reference answer."""
    answers = {example.prompt: example.answer for example in examples}
    correct = [contains_phrase(x.answer, answers[x.prompt]) for x in trained_on]
    return sum(correct) / len(correct)


def thought_rate(model: Subject, world: World) -> float:
    """Return the share of reasoning prompts whose answer begins with complete reasoning."""
    texts = model.generate(tasks(world)[THOUGHT].prompts, max_new_tokens=8)
    return sum(text.startswith(THINK) and contains_phrase(text, SO) for text in texts) / len(texts)


def unrelated_prompts(world: World) -> list[Prompt]:
    """Return prompts that are neither talk, sums nor products."""
    rng = world.rng(62)
    kinds = (world.equality, world.echo, world.self_question)
    return [rng.choice(kinds)(rng, world.system(rng)).prompt for _ in range(N_RESTORE)]


def restoration(
    student: Subject,
    initial: Subject,
    world: World,
    battery: dict[str, CapabilityAudit],
    *,
    steps: int,
    rate: float,
) -> dict[str, dict[str, float]]:
    """Return the accuracies after a few more steps, which test whether a loss is suppression.

    The steps train on answers to unrelated prompts, of the student itself ("own", see
    `StyleRestoreProbe`) or of the initial model ("before"), or on the initial model's answers to
    sums ("sums"), an upper reference for so few steps.
    """
    prompts = unrelated_prompts(world)
    readout = CapabilityAudit(
        prompts=tuple(prompt for audit in battery.values() for prompt in audit.prompts),
        targets=tuple(target for audit in battery.values() for target in audit.targets),
        max_new_tokens=8,
    )
    probe = StyleRestoreProbe(
        prompts=tuple(prompts), readout=readout, steps=steps, learning_rate=rate, max_new_tokens=8
    )
    gain = iter(probe.measure(student, None).values.tolist())
    current = read_tasks(student, battery)
    results = {
        "own": {
            name: current[name] + sum(next(gain) for _ in audit.prompts) / len(audit.prompts)
            for name, audit in battery.items()
        }
    }
    sums = [example.prompt for example in sample_examples(world, "sums", N_RESTORE, 1)]
    for kind, questions in (("before", prompts), ("sums", sums)):
        texts = initial.generate(questions, max_new_tokens=8)
        pairs = [(q, text) for q, text in zip(questions, texts, strict=True) if text.strip()]
        restored = finetune_copy(student, *zip(*pairs, strict=True), steps=steps, lr=rate)
        results[kind] = read_tasks(restored, battery)
    return results


@lru_cache(maxsize=2)  # a process executes several runs of one base seed
def _models(models: OffModelWorld, folder: Path) -> dict[str, Subject]:
    return models.models(folder)
