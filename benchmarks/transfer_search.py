"""python -m benchmarks.transfer_search --pairs P: how far a trait moves when one setting changes.

Distills U and B of each pair into M with the settings of docs/studies/smollm2.md and one change,
and prints log-odds(student of U) − log-odds(student of B), in nats, on the prompts of the probes. A
repeated call continues. --out may be the folder of `fastdistill experiment double-bind`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from fastdistill.alignment.experiment.double_bind import UNDEFENDED, make_study, other_student
from fastdistill.alignment.experiment.executors import Execution, run_all
from fastdistill.alignment.experiment.job import SOURCES
from fastdistill.alignment.experiment.pairs import read_pairs
from fastdistill.alignment.experiment.prepare_models import build_models
from fastdistill.alignment.experiment.study import Arm, Pair, make_pairs, to_student
from fastdistill.alignment.strategies.lessons import PoolPrompt
from fastdistill.alignment.strategies.strategy import RunState, Strategy, Training

TRAINING = Training(steps=60, batch_size=8, learning_rate=1e-3, max_new_tokens=16, student="lora:8")


@dataclass(frozen=True)
class SystemOfProbes(Strategy):
    """Gives every prompt of the pool the system message of a prompt that defines the trait."""

    systems: tuple[str | None, ...]

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        return [
            entry._replace(prompt=replace(entry.prompt, system=self.systems[i % len(self.systems)]))
            for i, entry in enumerate(pool)
        ]


def variants(systems: tuple[str | None, ...]) -> list[Arm]:
    """Return undefended distillation, and with one setting changed in each arm."""
    return [
        UNDEFENDED,
        replace(UNDEFENDED, name="rank 64", training=replace(TRAINING, student="lora:64")),
        replace(other_student(TRAINING), name="all weights"),
        replace(UNDEFENDED, name="T=2", settings={"temperature": 2.0}),
        replace(UNDEFENDED, name="three times the steps", training=replace(TRAINING, steps=180)),
        Arm(name="system messages of the probes", strategies=(SystemOfProbes(systems),)),
    ]


def shift(pair: Pair, folder: Path) -> dict[str, float]:
    """Return the difference in log-odds half way and at the end, and the capability."""
    student = to_student(pair, folder)
    differences = [fmean(at.untrusted.log_odds) - fmean(at.benign.log_odds) for at in student.curve]
    base, teacher = (fmean(reading.capability) for reading in (student.base, student.teacher))
    return {
        "half": differences[0],
        "end": differences[-1],
        "teachers": fmean(student.teacher.log_odds) - fmean(student.twin.log_odds),
        "C": (fmean(student.untrusted.capability) - base) / (teacher - base),
    }


def main() -> None:
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer_search", description=__doc__
    )
    parse.add_argument("--pairs", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--processes", type=int, default=1)
    parse.add_argument("--arms", nargs="*", help="some of them; default: all")
    parse.add_argument("--attn_implementation", default=None)
    options = parse.parse_args()
    sources = read_pairs(
        options.pairs, max_new_tokens=24, attn_implementation=options.attn_implementation
    )
    execution = Execution(processes=options.processes)
    build_models(sources, options.out, execution, "models")
    study = make_study(n=min(source.prompts for source in sources), training=TRAINING)
    systems = tuple(p.system for p in sources[0].load(options.out / SOURCES).probes.prompts)
    pairs: list[Pair] = []
    for arm in variants(systems):
        if not options.arms or arm.name in options.arms:
            # Undefended students are those of the study, whose audits are part of their runs.
            of_arm = study if arm is UNDEFENDED else replace(study, audits=())
            pairs += make_pairs(of_arm, [arm], sources, 1, {})
    run_all([job for p in pairs for job in (p.student, p.twin)], options.out, execution)
    print("| setting | pair | half way | end | of the teachers | C |")
    print("|---|--:|--:|--:|--:|--:|")
    for pair in pairs:
        row = shift(pair, options.out)
        cells = [f"{row[name]:.2f}" for name in ("half", "end", "teachers", "C")]
        print(f"| {pair.arm.name} | {pair.source.base_seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
