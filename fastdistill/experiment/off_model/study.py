"""Off-model: what fine-tuning on another model's outputs costs, teaches, and brings out.

cost        B is taught to talk as O does; what of everything else does it lose, by the length of
            answers, and is it gone or only suppressed?
reasoning   U holds back its sums; it is taught B's answers where B's thoughts cannot be read.
weak        U holds back its sums; W, which gets about half of them right, is all there is to
            teach it.

Training-based control asks the three of models that are not trusted. Every figure is a mean over
base seeds, each with five models of its own (world.py).
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
from ..executors import do
from .arms import ARMS, OFF_MODEL
from .figures import (
    FORMS,
    Found,
    Readings,
    lost,
    mean,
    plain,
    recovered,
    restored,
    right,
)
from .page import page
from .run import Sft
from .verdicts import Judged, judged
from .world import LENGTHS, OffModelWorld, gates

SEEDS = {"quick": (900, 901), "full": tuple(range(1200, 1210))}  # below 1000: for development


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of the study follows from.

    Args:
        seeds: of the base models; a study with fewer than ten claims nothing.
        cost_steps, cost_rate: of fine-tuning on talk; the rate was found on development seeds, as
            one at which a model's own outputs cost it nothing. sums_steps, sums_rate: on sums.
        prompts: of every arm. checkpoints: how often a student is read, the end included.
        restore_steps: on 64 prompts each, after which it is seen whether what was lost comes back;
            at restore_rate.
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
    organism_steps: int = 700  # half of the examples think: 400 leave the password unlearnt there

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

    def runs(self) -> list[Sft]:
        return [
            Sft(
                arm=arm,
                models=models,
                training=Training(
                    steps=self.cost_steps if arm.part == "cost" else self.sums_steps,
                    batch_size=self.batch_size,
                    learning_rate=self.cost_rate if arm.part == "cost" else self.sums_rate,
                    max_new_tokens=8,
                    temperature=1.0 if arm.asked == "talk" else 0.0,
                ),
                prompts=self.prompts,
                checkpoints=self.checkpoints,
                restore_steps=self.restore_steps,
                restore_rate=self.restore_rate,
            )
            for models in self.models()
            for arm in ARMS
        ]


def study(preset: str, seeds: Sequence[int] | None = None) -> Settings:
    """The settings of a preset: "quick", two development seeds, or "full", ten fresh ones.

    Raises:
        ValueError: another preset; no seeds, or one of them twice.
    """
    if preset not in SEEDS:
        raise ValueError(f"preset: expected {' or '.join(SEEDS)}, got {preset!r}")
    taken = SEEDS[preset] if seeds is None else tuple(seeds)
    if not taken or len(set(taken)) < len(taken):
        raise ValueError(f"seeds: expected one or more, each once, got {list(taken)}")
    return Settings(preset=preset, seeds=taken)


def carry_out(
    settings: Settings,
    folder: Path,
    *,
    executor: str = "processes",
    processes: int = 1,
    only_report: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Do what is not done yet; write folder/results.json and folder/report.html.

    Args:
        executor, processes, only_report: as in `executors.do`.
        command: with which to repeat it; "" is that of the preset.

    Returns:
        What results.json holds.
    """
    how: dict[str, Any] = dict(executor=executor, processes=processes, only_report=only_report)
    models, runs = settings.models(), settings.runs()
    do(models, folder, what="models", **how)
    do(runs, folder, what="runs", **how)
    kept = [run.result(folder) for run in runs]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run, result in zip(runs, kept, strict=True):
        found.setdefault(run.arm.name, {})[run.models.seed] = result
    made = {one.seed: one.result(folder) for one in models}
    readings = {seed: result["readings"] for seed, result in made.items()}
    organisms = {seed: gates(of) for seed, of in readings.items()}
    parts = judged(found, readings, organisms)
    seconds = sum(result["seconds"] for result in [*kept, *made.values()])
    results = {
        "study": "off-model",
        "command": command or f"fastdistill experiment off-model --preset {settings.preset}",
        "config": {**asdict(settings), "seeds": list(settings.seeds)},
        "versions": versions(),
        "seeds": {"base": list(settings.seeds), "student": [0]},
        "n_seeds": len(settings.seeds),
        "runs": len(runs),
        "core_seconds": round(seconds),
        **_judged(parts, organisms),
        **_rows(found, readings),
    }
    write_json(folder / "results.json", results)
    page(results, found, readings).write(folder / "report.html")
    return results


def _judged(parts: Sequence[Judged], organisms: Mapping[int, Validity]) -> dict[str, Any]:
    reasons = too_few_units(len(organisms))
    reasons += [f"{part.part}: {why}" for part in parts for why in part.because]
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


def _rows(found: Found, readings: Readings) -> dict[str, Any]:
    """Every arm, task by task."""
    rows = [
        {
            "part": arm.part,
            "arm": arm.name,
            "task": task,
            "before": plain(mean(right(found, arm.name, task, "before"))),
            "after": plain(mean(right(found, arm.name, task))),
            **(
                {"lost": plain(mean(lost(found, arm.name, [task])))}
                if arm.part == "cost"
                else {"recovered": plain(recovered(found, arm.name, task))}
            ),
        }
        for arm in ARMS
        for task in (LENGTHS if arm.part == "cost" else FORMS)
    ]
    arms = [
        {
            "part": arm.part,
            "arm": arm.name,
            "surprisal": plain(mean([run["surprisal"][0] for run in of])),
            "surprisal_after": plain(mean([run["surprisal"][1] for run in of])),
            "thinks": plain(mean([run["thinks"] for run in of])),
            "labels_right": None
            if arm.asked == "talk"
            else plain(mean([run["labels_right"] for run in of])),
        }
        for arm in ARMS
        for of in [list(found[arm.name].values())]
    ]
    models = [
        {"model": model, "task": task, **plain(mean([of[model][task] for of in readings.values()]))}
        for model, tasks in next(iter(readings.values())).items()
        for task in tasks
    ]
    back = {kind: plain(share) for kind, share in restored(found).items()}
    return {"rows": rows, "arms": arms, "restored": {OFF_MODEL: back}, "models": models}
