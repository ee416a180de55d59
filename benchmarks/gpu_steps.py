"""The steps of benchmarks/gpu.sh, their time limits, and a line with the verdict of each.

The order is that of a first contact with a GPU: what is quick and tells most comes first, and what
compiles for minutes comes last. Only the standard library is imported here, so that a broken
installation of torch fails in a step, with its traceback.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import packages

ROOT = Path(__file__).resolve().parents[1]
IN_ALL_S = 585
LEAST_S = 10  # with less time left, a step is not started
# Variants that the checks of each group compile with this Triton, counted with a stub in the place
# of the CUDA driver, and the seconds of CPU time for one of them, with its C launcher, on a machine
# whose cores were all busy: `python tests/helpers/host_path.py`.
TRITON = "3.6.0"
VARIANTS = {"losses": 366, "quantized": 89}
SECONDS_PER_VARIANT = {"losses": 0.36, "quantized": 0.13}
SLOWER = 1.1  # more leaves no time for the figures; checks before a limit have their verdicts
START_S = 20  # imports from a cold disk, and the CUDA context
INDUCTOR_S = 30  # one torch.compile, for the check `compiled`
RUN_S = 30  # the checks themselves, most of it fp64 references
REDUCTION = "reduce_rows"  # the kernel with barriers and shared memory
SMALL = (
    "near_convergence",
    "filtered",
    "dense_teacher",
    "primitive_scores_and_topk",
    "rows_are_rounded_alike",
    "every_compute_against_fp64",
)


class Step(NamedTuple):
    """A command with a limit; with last_case_s > 0 it starts no case that late before the limit."""

    name: str
    seconds: int
    command: tuple[str, ...]
    last_case_s: int = 0

    def argv(self, limit: int) -> list[str]:
        budget = ["--budget-seconds", str(limit - self.last_case_s)] if self.last_case_s else []
        return [*self.command, *budget]


def compile_seconds(*groups: str) -> int:
    """An upper estimate of the seconds that Triton needs for these groups of checks."""
    return round(SLOWER * sum(VARIANTS[g] * SECONDS_PER_VARIANT[g] for g in groups))


def build_settings() -> list[str]:
    """Variables of setup.py: build for the GPUs that are here only, and fail if nvcc fails."""
    if shutil.which("nvidia-smi") is None or shutil.which("nvcc") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    capabilities = {line.strip().replace(".", "") for line in done.stdout.splitlines()}
    archs = ";".join(sorted(filter(str.isdecimal, capabilities), key=int))
    return [f"FASTDISTILL_CUDA_ARCHS={archs}", "FASTDISTILL_CUDA=1"] if archs else []


def steps(what: str, out: str, commit: str | None, settings: Sequence[str]) -> list[Step]:
    """The steps of `what`: "all", "large" or "sanitize"; settings: VARIABLE=value of the build."""
    python = (sys.executable,)
    build = (*python, "setup.py", "-q", "build_ext", "--inplace")
    checks = (*python, "tests/test_gpu.py")

    def bench(*arguments: str) -> tuple[str, ...]:
        recorded = () if commit is None else ("--commit", commit)
        return (*python, "-m", "benchmarks", *arguments, "--out", out, *recorded)

    first = [
        Step("machine", 10, ("nvidia-smi",)),
        Step("versions", 30, (*python, "-m", "benchmarks.packages")),
        Step("build", 80, ("env", *settings, *build)),
    ]
    if what == "large":
        return [
            *first,
            Step("large teachers", 160, bench("large_teacher")),
            Step("large students", 300, bench("large_student")),
        ]
    if what == "sanitize":
        return [*first, *_sanitizer(checks)]
    kernel_checks_s = START_S + compile_seconds("losses", "quantized") + INDUCTOR_S + RUN_S
    return [
        *first,
        Step("kernel checks", kernel_checks_s, (*checks, "losses", "quantized")),
        Step("host time", 45, bench("host_time")),
        Step("heads", 175, bench("heads", "--repeats", "3"), last_case_s=30),
        Step("quantized layers", 60, bench("quantized_gpu", "--repeats", "5"), last_case_s=15),
        Step("gradient error", 60, bench("gradient_error", "tile_skipping")),
        Step("training and plan checks", 150, (*checks, "training", "plans")),
        Step("a training step", 60, bench("train_step")),
        Step("heads, compiled", 220, bench("heads_compiled", "--repeats", "3"), last_case_s=60),
    ]


def _sanitizer(checks: tuple[str, ...]) -> list[Step]:
    """Small checks without PyTorch's cache of memory, which hides reads past the end of a tensor.

    The slower tools look at one kernel each, so that those of PyTorch and cuBLAS run at full speed.
    """

    def tool(name: str, *kernel: str) -> tuple[str, ...]:
        one = ("--kernel-name", f"kernel_substring={kernel[0]}") if kernel else ()
        command = ("compute-sanitizer", "--tool", name, "--error-exitcode", "9", *one)
        return ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command, *checks)

    return [
        Step("memcheck", 240, (*tool("memcheck"), *SMALL)),
        Step("racecheck", 100, (*tool("racecheck", REDUCTION), "near_convergence")),
        Step("synccheck", 100, (*tool("synccheck", REDUCTION), "near_convergence")),
    ]


def run_step(argv: Sequence[str], limit: float) -> str:
    """Run a command and return its verdict: "ok", "FAILED, exit code N" or "STOPPED after N s".

    A stopped Python script gets a moment to print its stack (tests/test_gpu.py does).
    """
    try:
        process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True)
    except OSError as error:
        return f"FAILED, {error}"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, sent)
            try:
                process.wait(3)
                break
            except subprocess.TimeoutExpired:
                continue
        return f"STOPPED after {limit:.0f} s"
    return "ok" if code == 0 else f"FAILED, exit code {code}"


def run_all(
    chosen: Sequence[Step],
    run: Callable[[Sequence[str], float], str] = run_step,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Run the steps while time is left, print the verdict of each, and return 1 if any failed."""
    end, verdicts = now() + IN_ALL_S, []
    for step in chosen:
        limit = min(step.seconds, int(end - now()))
        if limit < max(LEAST_S, step.last_case_s):
            verdicts.append(f"{step.name}: not run, out of time")
            continue
        argv, started = step.argv(limit), now()
        print(f"== {step.name}, at most {limit} s: {shlex.join(argv)}", flush=True)
        verdicts.append(f"{step.name}: {run(argv, limit)} ({now() - started:.0f} s)")
        print(f"== {verdicts[-1]}", flush=True)
    print("== verdicts", *verdicts, sep="\n", flush=True)
    return int(not all(": ok (" in verdict for verdict in verdicts))


def main(argv: Sequence[str] | None = None) -> int:
    cli = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    cli.add_argument("what", nargs="?", choices=("all", "large", "sanitize"), default="all")
    cli.add_argument("--dry-run", action="store_true", help="print the steps and run none")
    cli.add_argument("--wheels", action="store_true", help="name the packages to bring here")
    cli.add_argument("--out", default="benchmarks/results", metavar="DIR")
    cli.add_argument("--commit")
    args = cli.parse_args(argv)
    if args.wheels:
        print(packages.wheels())
        return 0
    chosen = steps(args.what, args.out, args.commit, build_settings())
    if args.dry_run:
        for step in chosen:
            command = shlex.join(step.argv(step.seconds))
            print(f"== {step.name}, at most {step.seconds} s: {command}")
        return 0
    return run_all(chosen)


if __name__ == "__main__":
    sys.exit(main())
