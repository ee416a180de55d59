"""The demo: compare top-k distillation with training on labels.

Two students per seed start from the same weights and see the same text in the same order for the
same number of steps. One learns from the teacher's top k, the other from labels. Any difference on
held-out text is due to the teacher.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability as cpu_capability
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ....runtime.atomic_files import check_folder, write_atomically, write_json
from ....runtime.backend import one_thread, versions
from ....runtime.checks import fail, integer
from ....runtime.intervals import Estimate, bootstrap_ratio, mean_of_runs, paired_difference
from ....teachers.cache import TeacherCache
from ....teachers.local import Teacher
from ....training.config import DistillConfig
from ....training.loss import EVAL_COLUMNS
from ....training.progress import PhaseProgress
from ....training.trainer import DistillTrainer
from . import corpus
from .corpus import Corpus, Windows
from .models import (
    STUDENT,
    TEACHER,
    TOKENS_PER_BATCH,
    WINDOW,
    new_llama,
    save_tokenizer,
    shipped_teacher,
    train_model,
)
from .result import ARMS, METRICS, DemoResult, DemoRun, DemoSetting

# The best value of 1e-3 to 7e-3 for training on labels, and near the best for distillation.
STUDENT_LEARNING_RATE = 2e-3


def run_demo(
    *,
    out: str | Path,
    data: str | Path | None = None,
    seeds: int = 3,
    steps: int = 320,
    k: int = 64,
    batch_size: int = 4,
    teacher_steps: int = 400,
) -> DemoResult:
    """Run the demo and write report.html, results.json, models and text to `out`.

    Args:
        out: output folder.
        data: a text file or folder; a tokenizer and a teacher are first trained on it. None: the
            source of the standard library and the teacher of fastdistill_demo_teacher.
        seeds: independent repetitions; an interval needs two.
        steps, batch_size: of each student, in windows of 128 tokens.
        k: number of the teacher's tokens per position.
        teacher_steps: training steps of the teacher, with data.
    """
    sizes = {"seeds": seeds, "steps": steps, "k": k, "batch_size": batch_size}
    for name, value in {**sizes, "teacher_steps": teacher_steps}.items():
        integer(name, value, 1)
    folder = Path(out)
    check_folder("out", folder)  # before minutes of training
    start = time.perf_counter()
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="fastdistill-") as temporary:
        setting = _prepare(data, steps * batch_size, k, teacher_steps)
        with one_thread():
            cache, cache_seconds = _build_cache(setting, temporary, k)
            with PhaseProgress() as progress:
                runs = [
                    _run(arm, seed, setting, cache, sizes, progress)
                    for seed in range(seeds)
                    for arm in ARMS
                ]
                teacher_sums = _held_out_sums(setting.teacher.model, setting, cache, k)
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in sizes.items())
    result = DemoResult(
        estimates={
            **_student_estimates(runs),
            **_teacher_estimates(teacher_sums, setting.held_out),
        },
        runs=runs,
        facts={
            "command": "fastdistill demo" + (" --data …" if data else "") + options,
            "versions": versions(),
            "machine": f"{platform.machine()} CPU ({cpu_capability()}), one thread",
            "setting": {**sizes, **setting.facts},
        },
        cache_seconds=cache_seconds,
        seconds=time.perf_counter() - start,
    )
    from .report import demo_report  # matplotlib is slow to import

    demo_report(result).write(folder / "report.html")
    write_json(folder / "results.json", result.as_json())
    with _quiet_transformers():
        save_files(folder, setting)
    return result


def _prepare(data: str | Path | None, n_windows: int, k: int, teacher_steps: int) -> DemoSetting:
    text = corpus.standard_library() if data is None else corpus.from_path(data)
    if data is None:
        teacher, tokenizer, manifest = shipped_teacher()
        about = (
            f"{manifest['steps']:,} steps on {manifest['tokens']:,} tokens, shipped with the demo"
        )
    else:
        with PhaseProgress() as progress:
            teacher, tokenizer = _teacher_from(text, teacher_steps, progress)
        about = f"{teacher_steps:,} steps on this text, trained for this report"
    if k > teacher.vocab_size:
        fail("k", f"at most the vocabulary's {teacher.vocab_size}", k)
    train = corpus.packed_windows(text.train, tokenizer, length=WINDOW, max_windows=n_windows)
    held_out = corpus.document_windows(text.held_out, tokenizer, length=WINDOW, per_document=4)
    facts = {
        "text": text.name if data is None else "your own text",
        "teacher": about,
        "teacher_parameters": _size(teacher.model),
        "student_parameters": _size(new_llama(STUDENT, vocab_size=teacher.vocab_size, seed=0)),
        "vocabulary": teacher.vocab_size,
        "train_tokens": train.ids.numel(),
        "held_out_tokens": held_out.ids.numel(),
        "held_out_documents": len(set(held_out.document.tolist())),
        "bytes_per_token": held_out.bytes_per_token,
        "learning_rate": STUDENT_LEARNING_RATE,
    }
    return DemoSetting(teacher, tokenizer, train, held_out, facts)


def _build_cache(setting: DemoSetting, folder: str, k: int) -> tuple[TeacherCache, float]:
    """Return the teacher's answers on all windows, and the seconds that they took."""
    start = time.perf_counter()
    windows = torch.cat([setting.train.ids, setting.held_out.ids])
    cache = TeacherCache.build(setting.teacher, _examples(windows), folder, k=k)
    return cache, time.perf_counter() - start


def _examples(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row} for row in windows]


def _teacher_from(
    text: Corpus, steps: int, progress: PhaseProgress
) -> tuple[Teacher, PreTrainedTokenizerBase]:
    tokenizer = corpus.train_tokenizer(text.train)
    windows = corpus.packed_windows(text.train, tokenizer, length=WINDOW)
    trained = train_model(
        new_llama(TEACHER, vocab_size=len(tokenizer), seed=0),
        windows.ids,
        teacher=None,
        steps=steps,
        batch_size=16,
        learning_rate=3e-3,
        seed=0,
        callbacks=progress.phase("training the teacher", total=steps),
    )
    teacher = Teacher(trained.model, tokenizer=tokenizer, tokens_per_batch=TOKENS_PER_BATCH)
    return teacher, tokenizer


def _run(
    arm: str,
    seed: int,
    setting: DemoSetting,
    cache: TeacherCache,
    sizes: dict[str, int],
    progress: PhaseProgress,
) -> DemoRun:
    trained = train_model(
        new_llama(STUDENT, vocab_size=setting.teacher.vocab_size, seed=seed),
        setting.train.ids,
        teacher=cache if arm == "distilled" else None,
        steps=sizes["steps"],
        batch_size=sizes["batch_size"],
        learning_rate=STUDENT_LEARNING_RATE,
        seed=seed,
        k=sizes["k"],
        callbacks=progress.phase(f"seed {seed + 1}, {arm}", total=sizes["steps"]),
    )
    sums = _held_out_sums(trained.model, setting, cache, sizes["k"])
    metrics = {
        name: float(sums[metric.column].sum() / sums["tokens"].sum())
        * _unit(name, setting.held_out)
        for name, metric in METRICS.items()
    }
    return DemoRun(
        arm=arm, seed=seed, history=trained.history, seconds=trained.seconds, metrics=metrics
    )


def _held_out_sums(
    model: nn.Module, setting: DemoSetting, cache: TeacherCache, k: int
) -> dict[str, np.ndarray]:
    """Return the sums of EVAL_COLUMNS within each held-out window."""
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as folder:
        args = DistillConfig(
            folder,
            k=k,
            per_device_eval_batch_size=32,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = DistillTrainer(model, cache, args)
        rows = trainer.predict(_examples(setting.held_out.ids)).predictions
    return dict(zip(EVAL_COLUMNS, rows.astype(np.float64).T, strict=True))


def save_files(folder: Path, setting: DemoSetting) -> None:
    """Write teacher/, student/ (initial weights of seed 0), train.jsonl and held-out.jsonl."""
    student = new_llama(STUDENT, vocab_size=setting.teacher.vocab_size, seed=0)
    for name, model in (("teacher", setting.teacher.model), ("student", student)):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, setting.tokenizer)
    for name, windows in (("train", setting.train), ("held-out", setting.held_out)):
        texts = setting.tokenizer.batch_decode(windows.ids)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(folder / f"{name}.jsonl", "".join(lines))


def _student_estimates(runs: list[DemoRun]) -> dict[str, Estimate]:
    estimates = {}
    for name in METRICS:
        by_arm = {arm: [run.metrics[name] for run in runs if run.arm == arm] for arm in ARMS}
        for arm, values in by_arm.items():
            estimates[f"{name}/{arm}"] = mean_of_runs(values)
        estimates[f"{name}/difference"] = paired_difference(*(by_arm[arm] for arm in ARMS))
    for arm in ARMS:
        estimates[f"train_seconds/{arm}"] = mean_of_runs([r.seconds for r in runs if r.arm == arm])
    return estimates


def _teacher_estimates(sums: dict[str, np.ndarray], held_out: Windows) -> dict[str, Estimate]:
    """Return the estimates of the teacher, with intervals over documents instead of seeds."""
    tokens, documents = sums["tokens"].tolist(), held_out.document.tolist()
    return {
        f"{name}/teacher": bootstrap_ratio(
            (sums[METRICS[name].column] * _unit(name, held_out)).tolist(), tokens, documents
        )
        for name in ("nll", "bits_per_byte", "top1")
    }


def _unit(name: str, held_out: Windows) -> float:
    return 1 / (math.log(2) * held_out.bytes_per_token) if name == "bits_per_byte" else 1.0


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
