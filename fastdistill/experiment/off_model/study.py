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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...backend import versions
from ...files import write_json
from ...organisms.organism import ModelOrganism
from ...report.validity import too_few_units
from ...statistics import Validity
from ...strategies.strategy import Training
from ..executors import SERIAL, Execution, run_all
from .arms import ARMS, OFF_MODEL
from .figures import (
    FORMS,
    Readings,
    RunsByArm,
    accuracy,
    capability_drop,
    mean,
    recovered_share,
    restored_share,
    to_json,
)
from .page import make_page
from .run import SftRun
from .verdicts import PartVerdict, judge_parts
from .world import LENGTHS, OffModelWorld, model_gates

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
    if preset not in SEEDS:
        raise ValueError(f"preset: expected {' or '.join(SEEDS)}, got {preset!r}")
    chosen = SEEDS[preset] if seeds is None else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds: expected one or more distinct seeds, got {list(chosen)}")
    return OffModelSettings(preset=preset, seeds=chosen)


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
    run_results = [run.result(folder) for run in runs]
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run, result in zip(runs, run_results, strict=True):
        by_arm.setdefault(run.arm.name, {})[run.models.seed] = result
    model_results = {world.seed: world.result(folder) for world in models}
    readings = {seed: result["readings"] for seed, result in model_results.items()}
    organisms = {seed: model_gates(values) for seed, values in readings.items()}
    parts = judge_parts(by_arm, readings, organisms)
    seconds = sum(result["seconds"] for result in [*run_results, *model_results.values()])
    results = {
        "study": "off-model",
        "command": command or f"fastdistill experiment off-model --preset {settings.preset}",
        "config": {**asdict(settings), "seeds": list(settings.seeds)},
        "versions": versions(),
        "seeds": {"base": list(settings.seeds), "student": [0]},
        "n_seeds": len(settings.seeds),
        "runs": len(runs),
        "core_seconds": round(seconds),
        **_verdict_rows(parts, organisms),
        **_rows(by_arm, readings),
    }
    write_json(folder / "results.json", results)
    make_page(results, by_arm, readings).write(folder / "report.html")
    return results


def _verdict_rows(
    parts: Sequence[PartVerdict], organisms: Mapping[int, Validity]
) -> dict[str, Any]:
    reasons = too_few_units(len(organisms))
    reasons += [f"{part.part}: {failure}" for part in parts for failure in part.failures]
    return {
        "valid": not reasons,
        "invalid_because": reasons,
        "controls": [
            {"part": part.part, **gate}
            for part in parts
            for gate in Validity(gates=part.controls).as_json()["gates"]
        ],
        "organisms": {str(seed): validity.as_json() for seed, validity in organisms.items()},
        "differences": [
            {"part": part.part, **difference.as_json()}
            for part in parts
            for difference in part.differences
        ],
        "in_short": {part.part: part.brief if part.valid else "" for part in parts},
        "verdicts": {part.part: part.verdict for part in parts},
    }


def _rows(by_arm: RunsByArm, readings: Readings) -> dict[str, Any]:
    """Return the results by arm and task, of arms, of restoration and of models."""
    rows = [
        {
            "part": arm.part,
            "arm": arm.name,
            "task": task,
            "before": to_json(mean(accuracy(by_arm, arm.name, task, "before"))),
            "after": to_json(mean(accuracy(by_arm, arm.name, task))),
            **(
                {"lost": to_json(mean(capability_drop(by_arm, arm.name, [task])))}
                if arm.part == "cost"
                else {"recovered": to_json(recovered_share(by_arm, arm.name, task))}
            ),
        }
        for arm in ARMS
        for task in (LENGTHS if arm.part == "cost" else FORMS)
    ]
    arms = [
        {
            "part": arm.part,
            "arm": arm.name,
            "surprisal": to_json(mean([run["surprisal"][0] for run in values])),
            "surprisal_after": to_json(mean([run["surprisal"][1] for run in values])),
            "thinks": to_json(mean([run["thinks"] for run in values])),
            "labels_right": None
            if arm.prompt_kind == "talk"
            else to_json(mean([run["labels_right"] for run in values])),
        }
        for arm in ARMS
        for values in [list(by_arm[arm.name].values())]
    ]
    models = [
        {
            "model": model,
            "task": task,
            **to_json(mean([values[model][task] for values in readings.values()])),
        }
        for model, tasks in next(iter(readings.values())).items()
        for task in tasks
    ]
    shares = {kind: to_json(share) for kind, share in restored_share(by_arm).items()}
    return {"rows": rows, "arms": arms, "restored": {OFF_MODEL: shares}, "models": models}
