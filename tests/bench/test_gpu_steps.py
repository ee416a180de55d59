"""benchmarks/gpu.sh: its steps fit ten minutes, and each one leaves a verdict."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_steps, packages
from benchmarks.gpu_steps import IN_ALL_S, Step, run_all, run_step, steps
from benchmarks.shapes import SUITES
from helpers.gpu_table import CHECKS, GROUPS

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["FASTDISTILL_CUDA_ARCHS=90", "FASTDISTILL_CUDA=1"]
NAMES = {check.__name__ for check in CHECKS} | GROUPS.keys()


def of(what: str) -> dict[str, Step]:
    return {step.name: step for step in steps(what, "out", "abc", SETTINGS)}


@pytest.mark.parametrize("what", ["all", "large", "sanitize"])
def test_steps_name_existing_checks(what):
    for step in of(what).values():
        if "tests/test_gpu.py" in step.command:
            names = step.command[step.command.index("tests/test_gpu.py") + 1 :]
            assert names
            assert NAMES.issuperset(names)


def test_the_build_is_for_the_gpus_that_are_here(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n10.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    settings = gpu_steps.build_settings()
    assert settings == ["FASTDISTILL_CUDA_ARCHS=90;100", "FASTDISTILL_CUDA=1"]
    monkeypatch.setattr(shutil, "which", {"nvidia-smi": "nvidia-smi"}.get)
    assert gpu_steps.build_settings() == []
    assert of("all")["build"].command[:3] == ("env", *SETTINGS)


@pytest.mark.parametrize("what", ["large", "sanitize"])
def test_limits_of_steps_that_have_their_own_end_fit_together(what):
    assert sum(step.seconds for step in of(what).values()) <= IN_ALL_S


def test_what_compiles_for_minutes_comes_last():
    names = list(of("all"))
    assert names[:4] == ["machine", "versions", "build", "kernel checks"]
    assert names[-1] == "heads, compiled"
    assert not any(entry.compiled for entry in SUITES["heads"])
    assert all(entry.compiled for entry in SUITES["heads_compiled"])
    before = itertools.takewhile(lambda name: name != "quantized layers", names)
    assert sum(of("all")[name].seconds for name in before) < IN_ALL_S  # the figures are measured
    compile_s = sum(
        count * gpu_steps.SECONDS_PER_VARIANT[group] for group, count in gpu_steps.VARIANTS.items()
    )
    assert of("all")["kernel checks"].seconds > 1.5 * compile_s


def test_the_sanitizer_sees_each_tensor_and_a_kernel_that_exists():
    commands = [of("sanitize")[name].command for name in ("memcheck", "racecheck", "synccheck")]
    assert {command[:2] for command in commands} == {("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")}
    assert f"kernel_substring={gpu_steps.REDUCTION}" in commands[1]
    assert f"def {gpu_steps.REDUCTION}(" in (ROOT / "kernels" / "triton_reduce.py").read_text()


def test_every_step_has_a_verdict_and_none_starts_without_time(capsys):
    clock = itertools.chain([0.0, 0.0], itertools.repeat(IN_ALL_S - 40.0))
    chosen = [Step("a", 99, ("x",), last_case_s=9), Step("b", 99, ("y",)), Step("c", 99, (), 50)]
    calls = []

    def run(argv, limit):
        calls.append((list(argv), limit))
        return "ok" if argv[0] == "x" else "FAILED, exit code 3"

    assert run_all(chosen, run, lambda: next(clock)) == 1
    assert calls == [(["x", "--budget-seconds", "90"], 99), (["y"], 40)]
    output = capsys.readouterr().out.split("== verdicts\n")[1].splitlines()
    assert [line.partition(" (")[0] for line in output] == [
        "a: ok",
        "b: FAILED, exit code 3",
        "c: not run, out of time",
    ]
    assert run_all(chosen[:1], lambda argv, limit: "ok", lambda: 0.0) == 0


def test_a_command_ends_with_its_verdict():
    assert run_step([sys.executable, "-c", "raise SystemExit(9)"], 60) == "FAILED, exit code 9"
    assert run_step(["sleep", "60"], 0.1) == "STOPPED after 0 s"
    assert run_step(["no-such-command"], 1).startswith("FAILED, [Errno 2]")


@pytest.mark.slow
def test_a_stopped_check_prints_its_stack():
    """And the checks that had ended have their verdicts by then."""
    code = (
        "import runpy, sys, time; sys.path[:0] = ['tests', '.']; import helpers.gpu_table as t; "
        "done = lambda: None; done.__name__ = 'done'; "
        "hung = lambda: (print('hung', flush=True), time.sleep(60)); hung.__name__ = 'hung'; "
        "t.CHECKS[:] = [done, hung]; t.GROUPS.clear(); t.GROUPS['losses'] = t.CHECKS; "
        "sys.argv = ['x', 'losses']; runpy.run_path('tests/test_gpu.py', run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        process.terminate()
        stack = process.stdout.read()
    assert lines[0].startswith("done: ok (")
    assert "most recent call first" in stack
    assert "in main" in stack


def test_the_packages_to_bring_are_pinned(monkeypatch):
    monkeypatch.setattr(packages, "installed", {"peft": "1", "dill": "1"}.get)
    text = packages.wheels()
    assert f" bitsandbytes=={packages.pins()['bitsandbytes']} " in text
    assert " liger-kernel " in text
    assert "peft" not in text
    monkeypatch.setattr(packages, "installed", lambda name: "1")
    assert packages.wheels() == "every package that the benchmarks want is installed"


def test_versions_name_setuptools_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(packages, "installed", {"setuptools": "80.1"}.get)
    lines = packages.describe().splitlines()
    assert lines[1].startswith("setuptools 80.1, pybind11 missing")
    assert "missing trl, for rows of TRL" in lines


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_runs_the_steps():
    dry = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", "large"]
    output = subprocess.run(dry, capture_output=True, text=True, check=True).stdout
    assert [line.split(",")[0] for line in output.splitlines()] == [f"== {n}" for n in of("large")]
    assert "--out benchmarks/results" in output
