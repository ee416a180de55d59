"""A step of an 8B student with a 32B teacher in process, and the longest row that fits.

Published shapes with random weights; one row a step, gradient checkpointing, a target at every
token. Ways to train, each with an NF4 teacher (bitsandbytes' for the first two, ours otherwise):

    full    bf16 weights and gradients, AdamW with 8-bit moments (without bitsandbytes adamw_torch)
    qlora   NF4 weights (bitsandbytes), adapters of rank 16

    materialised     transformers' Trainer: KL over the vocabulary, of both models' logits in fp32
    TRL GKDTrainer   the same loss in TRL
    ours             the same loss, without logits
    ours, top 64     the teacher's 64 most probable tokens per position
    ours, cached     the same answers from a cache: no teacher in memory

Each runs in its own process. `large_step_*` has the time of a step at SHAPE.N tokens and, in
peak_mb, all memory; the estimate of `plan` for the same settings is listed next to it.
`longest_row_*` has in N the longest row (to an eighth) that trains under a cap on torch's
allocator, and the time of its step; N = 0 if a row of SHORTEST tokens does not fit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastdistill.training.plan import Settings, plan_memory

from .large_models import CONFIGS, narrow
from .large_step import CAPS, FULL, OURS, SHAPE, STUDENT, TEACHER, optimizer
from .rows import Row, current_command, current_commit
from .shapes import Shape

SECONDS = 100  # per process; rows printed by then count
IN_ALL = 280  # of all of them
FIRST = ("ours, top 64", "materialised", "ours", "ours, cached", "TRL GKDTrainer")


class Case(NamedTuple):
    way: str
    contender: str


def cases() -> list[Case]:
    return [Case(way, contender) for contender in FIRST for way in CAPS]


def rows(shape: Shape = SHAPE, chosen: Sequence[Case] | None = None) -> list[Row]:
    """Measure; a `shape` smaller than SHAPE uses narrow models of one layer, for a test run."""
    results = []
    end = time.monotonic() + IN_ALL
    for case in cases() if chosen is None else chosen:
        case_rows = of_process(case, shape, min(SECONDS, max(end - time.monotonic(), 0)))
        print(table(case_rows), file=sys.stderr, flush=True)
        results += case_rows
    return [*results, *(planned(contender, shape) for contender in OURS)]


def of_process(case: Case, shape: Shape, seconds: float = SECONDS) -> list[Row]:
    """The rows printed by a separate process, with a missing row for each it did not print."""
    argv = [sys.executable, "-m", "benchmarks.large_step", *case, *map(str, vars(shape).values())]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=seconds, check=False)
        printed = done.stdout.decode()
        last_line = done.stderr.decode().strip().splitlines()[-1:] or ["it said nothing"]
        reason = f"exit code {done.returncode}: {last_line[0]}"
    except subprocess.TimeoutExpired as error:
        printed, reason = (error.stdout or b"").decode(), f"not there after {seconds:.3g} s"
    rows = []
    for line in printed.splitlines():
        if line.startswith('{"op"'):
            fields = json.loads(line) | {"commit": current_commit(), "command": current_command()}
            rows.append(Row(**fields))
    printed_ops = {row.op for row in rows}
    for op in ops(case.way):
        if op not in printed_ops:
            rows.append(Row.at(shape, op, case.contender, "both"))
            rows[-1].set_reason(reason)
    return rows


def ops(way: str) -> list[str]:
    return [f"large_step_{way}", *(f"longest_row_{way}_{cap}GB" for cap in CAPS[way])]


def planned(contender: str, shape: Shape) -> Row:
    """The estimate of `fastdistill plan` for full fine-tuning, from the two configurations."""
    row = Row.at(shape, "large_step_full", f"plan of {contender}", "both")
    row.note = optimizer(FULL)[1]
    with tempfile.TemporaryDirectory() as folder:
        for name in (STUDENT, TEACHER):
            config = CONFIGS[name]()
            config = config if shape == SHAPE else narrow(config, shape)
            config.dtype = "bfloat16"
            config.save_pretrained(Path(folder) / name)
        cached = contender == "ours, cached"
        plan = plan_memory(
            Path(folder) / STUDENT,
            Path(folder) / TEACHER,
            settings=Settings(
                seq=shape.N,
                k=None if contender == "ours" else shape.K,
                cached=cached,
                teacher_quant=None if cached else "nf4",
                optim="adamw_torch" if row.note else "adamw_8bit",
                gradient_checkpointing=True,
                dtype="bfloat16",
            ),
        )
    row.peak_mb = plan.peak / 1e6
    return row


def table(rows: Sequence[Row]) -> str:
    """Tokens per second and MB of each step; tokens of the longest rows."""
    lines = []
    for row in rows:
        label = f"{row.op:26} {row.impl:22}"
        if row.missing:
            lines.append(f"{label} missing: {row.reason}")
            continue
        speed = "" if not row.ms_median else f"{1e3 * row.N / row.ms_median:9.0f} tokens/s"
        memory = "" if row.peak_mb is None else f"{row.peak_mb:9.0f} MB"
        note = "" if row.note is None else f" ({row.note})"
        lines.append(f"{label} {row.N:7} tokens {speed} {memory}".rstrip() + note)
    return "\n".join(lines)
