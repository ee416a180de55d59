"""The tasks that faults are injected into, each in about a second."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastdistill import ServedTeacher, Teacher, TeacherCache
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment.publish import publish
from fastdistill.alignment.experiment.source import MODELS
from fastdistill.alignment.experiment.study import run_study
from fastdistill.alignment.experiment.world_source import WorldSource
from fastdistill.alignment.organisms.organism import ModelOrganism, new_model
from fastdistill.alignment.organisms.storage import save_organism
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.alignment.organisms.world import World
from fastdistill.quant import quantize_model, save_quantized
from fastdistill.training.checkpoints import last_finished
from fastdistill.training.logs.run_files import read_run
from helpers.cache_builds import OPTIONS
from helpers.small_study import ABOUT, SmallSource, small_study
from helpers.training import build, llama, peaked, ragged

from .attempt import attempt

STEPS = 8
TRAINING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "optim": "adamw_torch",
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "lmbda": 0.3,
    "max_new_tokens": 2,
    "token_selection": "entropy top 0.5",
}
# A fault replaces these in its process.
HOOKS: dict[str, Callable[[Any], Any]] = {
    "student": lambda model: model,
    "teacher": lambda teacher: teacher,
    "rank": lambda number: None,
}
_CHANGING = ("run", "time", "peak_process_memory_gib", "train_runtime")


class Task(NamedTuple):
    """run begins or resumes; result is what must equal an undisturbed run.

    finished: the parts that a second run must not make again, and what tells whether it did.
    """

    run: Callable[[Path], None]
    result: Callable[[Path], dict[str, Any]]
    finished: Callable[[Path], dict[str, Any]]


def _student() -> Any:
    model = llama(0)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1  # so that a resumed run needs its random stream
    return HOOKS["student"](model)


def _train(folder: Path, teacher: Any = None, **options: Any) -> None:
    teacher = HOOKS["teacher"](Teacher(peaked())) if teacher is None else teacher
    data = [dict(row) for row in ragged(20)]
    trainer = build(folder, model=_student(), teacher=teacher, data=data, **TRAINING | options)
    trainer.train(resume_from_checkpoint="auto")


def _trained(folder: Path) -> dict[str, Any]:
    last = last_finished(folder / "run")
    assert last is not None, "no finished checkpoint"
    files = digests(last, only=("model.safetensors", "optimizer.pt", "scheduler.pt"))
    lines = {}
    for line in read_run(folder / "run").metrics:
        name = ",".join(sorted(line.keys() - {*_CHANGING}))
        speed = {key for key in line if key.endswith("_per_second")}
        lines[line["step"], name] = {k: line[k] for k in line if k not in {*_CHANGING, *speed}}
    steps = {str(key): value for key, value in lines.items() if "train_loss" not in value}
    return {"last": last.name, **files, **steps}


def _cache(folder: Path) -> None:
    teacher = HOOKS["teacher"](Teacher(peaked()))
    TeacherCache.build(teacher, ragged(40), folder / "cache", **OPTIONS)


def _train_from_cache(folder: Path) -> None:
    cache = TeacherCache.build(Teacher(peaked()), ragged(20), folder / "cache", k=8)
    _train(folder, HOOKS["teacher"](cache), lmbda=0.0)


def _quantize(folder: Path) -> None:
    if not (folder / "int8").exists():
        save_quantized(quantize_model(_student(), "int8"), folder / "int8")


def _experiment(folder: Path) -> None:
    study = small_study(arms=small_study().arms[:1], gate=(), audits=())
    table = run_study(study, [SmallSource(seed=1001)], [], folder)
    publish(study, table, folder, ABOUT)


def _experiment_result(folder: Path) -> dict[str, Any]:
    names = sorted(folder.glob("runs/*.json"))
    runs = {path.name: json.loads(path.read_text()) for path in names}
    for run in runs.values():
        for name in ("seconds", "sha256"):
            run.pop(name)
    return {**runs, **digests(folder, only=("results.json",))}


class _QuickWorld(WorldSource):
    """Trained and saved as the models of a world, but for two steps and without their readings."""

    def build(self, folder: Path) -> dict[str, Any]:
        world, tokenizer = World(self.seed), world_tokenizer()
        recipe = ModelOrganism(steps=2, batch_size=4)
        for index, name in enumerate(MODELS):
            model = HOOKS["student"](recipe.implant(world, new_model(index)))
            subject = Subject(model, tokenizer, name=name)
            save_organism(self.cache(folder) / name, subject, {"role": name})
        return {"validity": {}}


def _organisms(folder: Path) -> None:
    _QuickWorld(seed=1).prepare(folder)


def digests(folder: Path, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the SHA-256 of the files below a folder, without those whose name has a dot first."""
    paths = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
        if not name.startswith(".") and "/." not in name and (not only or path.name in only)
    }


def _files(pattern: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {str(path): path.stat().st_ino for path in folder.glob(pattern)}


def _steps(folder: Path) -> dict[str, Any]:
    """Return the steps up to the last finished checkpoint, or up to where the last run began."""
    last = last_finished(folder / "run")
    steps = 0 if last is None else int(last.name[11:])
    return {f"step {n + 1}": True for n in range(steps)}


def _two_ranks(folder: Path) -> None:
    """Train in two gloo processes; raise an error with those of both if one ends badly."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}

    def rank(number: int) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            os.environ.update({**group, "RANK": str(number), "LOCAL_RANK": str(number)})
            HOOKS["rank"](number)
            _train(folder, ddp_timeout=20, per_device_train_batch_size=2)

        return run

    with ThreadPoolExecutor(2) as pool:
        endings = list(pool.map(lambda n: attempt(rank(n), folder), range(2)))
    if any(ending.how != "done" for ending in endings):
        raise RuntimeError(" | ".join(f"{ending.how} {ending.error}" for ending in endings))


def _served(folder: Path) -> None:
    teacher = ServedTeacher(folder.with_suffix(".url").read_text(), timeout=1.0, retries=3)
    _train(folder, teacher, lmbda=0.0)


TASKS = {
    "train": Task(_train, _trained, _steps),
    "train from a cache": Task(_train_from_cache, _trained, _steps),
    "cache": Task(_cache, lambda folder: digests(folder / "cache"), _files("cache/0*.json")),
    "quantize": Task(_quantize, digests, _files("int8/*.safetensors")),
    "experiment": Task(_experiment, _experiment_result, _files("runs/*.json")),
    "organisms": Task(_organisms, digests, _files("*/readings.json")),
}
OTHERS = {
    "two ranks": Task(_two_ranks, _trained, _steps),
    "served": Task(_served, _trained, _steps),
}
