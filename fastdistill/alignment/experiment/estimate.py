"""How long a study on checkpoints will take, measured before its first student."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...runtime.progress import say_on_stderr
from ..strategies.distil import distill
from .executors import Execution
from .job import SOURCES, Job, load

STEPS = 2  # of a measured training, the first of which is slower


def announce(jobs: Sequence[Job], folder: Path, execution: Execution, per_audits: float) -> None:
    """Print the number of students and answers that are missing, and about how long they take.

    It times one batch of answers, one reading and the second of two steps of the first student.
    Strategies that filter or audit add to it.

    Args:
        per_audits: seconds of the audits of a model.
    """
    pending = [job for job in jobs if job.source.is_slow and not job.is_done(folder)]
    if not pending or execution.only_report:
        return
    processes = execution.processes or os.cpu_count() or 1
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // processes))  # as a worker has
    try:
        say_on_stderr(_estimate(pending, folder, processes, per_audits))
    finally:
        torch.set_num_threads(threads)
        if processes > 1:
            load.cache_clear()  # workers load their own models


def _estimate(pending: Sequence[Job], folder: Path, processes: int, per_audits: float) -> str:
    job = pending[0]
    loaded, size = load(job.source, folder / SOURCES), job.training.batch_size
    setup = loaded.setup(job.role, job.pool)
    setup = replace(setup, pool=(*setup.pool, *setup.pool)[:size])
    ticks: list[float] = []

    def tick(_: object) -> None:
        ticks.append(time.perf_counter())

    answers = setup.teacher.generate
    training = replace(job.training, steps=STEPS)
    start = time.perf_counter()
    texts = answers(
        [entry.prompt for entry in setup.pool],
        max_new_tokens=training.max_new_tokens,
        temperature=training.temperature,
    )
    per_answer = (time.perf_counter() - start) / len(texts)
    setup = replace(setup, generate=lambda *args, **options: texts)
    result = distill(setup, [], training, measure=tick, measure_at=(1 / STEPS,))
    per_step = time.perf_counter() - ticks[0]
    start = time.perf_counter()
    loaded.read(result.student)
    per_reading = time.perf_counter() - start
    steps = sum(job.training.steps for job in pending)
    # Arms with the same prompts share the answers of a teacher.
    pools = {(job.source, job.role, job.student_seed, str(job.pool)) for job in pending}
    n_answers = len(pools) * len(loaded.setup(job.role, job.pool).pool)
    readings = sum(job.checkpoints for job in pending)
    seconds = n_answers * per_answer + steps * per_step + readings * per_reading
    seconds += len(pending) * per_audits
    return (
        f"{len(pending)} students: {n_answers:,} answers ({per_answer:.2g} s each), {steps:,} "
        f"steps ({per_step:.2g} s), {readings:,} readings ({per_reading:.2g} s), "
        f"{per_audits:.2g} s of audits each. About "
        f"{seconds / processes / 60:,.0f} min on {processes} "
        f"process{'' if processes == 1 else 'es'}."
    )
