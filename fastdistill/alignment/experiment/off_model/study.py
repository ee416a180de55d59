"""The off-model study: effects of fine-tuning on another model's outputs.

cost        B is trained on the talk of O. How much accuracy does it lose on other tasks, by answer
            length, and is the loss a removal or a suppression?
reasoning   U sandbags on sums and is trained on B's answers, whose reasoning is unreadable.
weak        U sandbags on sums and is trained by the weak supervisor W, which solves about half of
            them.

These are questions of training-based control of untrusted models. All results are means over base
seeds; each seed has its own five models (world.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from ....runtime.atomic_files import write_json
from ....runtime.backend import versions
from ....runtime.checks import choice, fail
from ...organisms.organism import ModelOrganism
from ...strategies.strategy import Training
from ..executors import SERIAL, Execution, run_all
from .analysis import SftRecord
from .arms import ARMS
from .page import OffModelResults, make_page
from .run import SftRun
from .verdicts import judge_parts
from .world import OffModelWorld, model_gates

SEEDS = {"quick": (900, 901), "full": tuple(range(1200, 1210))}  # below 1000: development seeds


@dataclass(frozen=True, kw_only=True)
class OffModelSettings:
    """The settings of the study.

    Args:
        seeds: of the base models; fewer than ten support no claim.
        cost_steps, cost_rate: steps and learning rate of fine-tuning on talk. The rate was tuned on
            development seeds so that training on own outputs costs nothing.
        sums_steps, sums_rate: steps and learning rate of fine-tuning on sums.
        prompts: per arm. checkpoints: number of evaluations, the end included.
        restore_steps, restore_rate: steps and learning rate of restoration, on 64 prompts.
        base_steps, capable_steps, organism_steps: of training the models.
    """

    preset: str
    seeds: tuple[int, ...]
    cost_steps: int = 120
    cost_rate: float = 1.5e-4
    sums_steps: int = 60
    sums_rate: float = 3e-4
    batch_size: int = 64
    prompts: int = 1920
    checkpoints: int = 4
    restore_steps: int = 16
    restore_rate: float = 3e-4
    base_steps: int = 400
    capable_steps: int = 500
    organism_steps: int = 700  # 400 do not suffice: half of the examples contain reasoning

    def models(self) -> list[OffModelWorld]:
        return [
            OffModelWorld(
                seed=seed,
                organism=ModelOrganism(
                    trait="sandbagging", reasoning=0.5, steps=self.organism_steps
                ),
                base_steps=self.base_steps,
                capable_steps=self.capable_steps,
            )
            for seed in self.seeds
        ]

    def runs(self) -> list[SftRun]:
        return [
            SftRun(
                arm=arm,
                models=models,
                training=Training(
                    steps=self.cost_steps if arm.part == "cost" else self.sums_steps,
                    batch_size=self.batch_size,
                    learning_rate=self.cost_rate if arm.part == "cost" else self.sums_rate,
                    max_new_tokens=8,
                    temperature=1.0 if arm.prompt_kind == "talk" else 0.0,
                ),
                prompts=self.prompts,
                checkpoints=self.checkpoints,
                restore_steps=self.restore_steps,
                restore_rate=self.restore_rate,
            )
            for models in self.models()
            for arm in ARMS
        ]


def preset_settings(preset: str, seeds: Sequence[int] | None = None) -> OffModelSettings:
    """Return the settings of "quick" (two development seeds) or "full" (ten fresh seeds).

    Raises:
        ValueError: an unknown preset; no seeds, or duplicates.
    """
    choice("preset", preset, SEEDS)
    base_seeds = SEEDS[preset] if seeds is None else tuple(seeds)
    if not base_seeds or len(set(base_seeds)) < len(base_seeds):
        fail("seeds", "one or more distinct seeds", list(base_seeds))
    return OffModelSettings(preset=preset, seeds=base_seeds)


def run_study(
    settings: OffModelSettings,
    folder: Path,
    execution: Execution = SERIAL,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Execute missing runs, write results.json and report.html, and return the results.

    `command` repeats the study; "": that of the preset.
    """
    models, runs = settings.models(), settings.runs()
    run_all(models, folder, execution, label="models")
    run_all(runs, folder, execution)
    by_arm: dict[str, dict[int, SftRecord]] = {}
    seconds = 0.0
    for run in runs:
        result = cast(SftRecord, run.result(folder))
        by_arm.setdefault(run.arm.name, {})[run.models.seed] = result
        seconds += result["seconds"]
    model_results = {world.seed: world.result(folder) for world in models}
    readings = {seed: result["readings"] for seed, result in model_results.items()}
    organisms = {seed: model_gates(values) for seed, values in readings.items()}
    results = OffModelResults(
        command=command or f"fastdistill experiment off-model --preset {settings.preset}",
        config={**asdict(settings), "seeds": list(settings.seeds)},
        versions=versions(),
        runs=len(runs),
        core_seconds=round(seconds + sum(r["seconds"] for r in model_results.values())),
        by_arm=by_arm,
        readings=readings,
        organisms=organisms,
        parts=judge_parts(by_arm, readings, organisms),
    )
    write_json(folder / "results.json", results.as_json())
    make_page(results).write(folder / "report.html")
    return results.as_json()
