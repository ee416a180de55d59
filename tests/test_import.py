"""`import fastdistill` is cheap and leaves no trace: measured in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS_BEYOND_TORCH = 0.3
HEAVY = ("transformers", "triton", "matplotlib", "accelerate", "peft", "typer", "rich")

# One interpreter for both halves: what the second import costs is what it adds to `import torch`.
PROBE = """
import json, os, sys, threading, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
def state():
    tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
    return [threading.active_count(), tasks, dict(os.environ), torch.get_num_threads(),
            str(torch.get_default_dtype()), torch.initial_seed(), sys.path[:], os.getcwd()]
before, loaded = state(), set(sys.modules)
start = time.perf_counter()
import fastdistill
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds, "torch_seconds": torch_seconds, "unchanged": before == state(),
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}),
}))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[Path]]:
    """Three runs of the probe, and the files that they left in their empty home."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        **dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_HOME", "HF_HOME"), str(home)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "import fastdistill printed something"
        runs.append(json.loads(done.stdout))
    return runs, list(home.rglob("*"))


@pytest.mark.slow
def test_import_adds_little_to_importing_torch(probes):
    best = min(run["seconds"] for run in probes[0])
    assert best <= SECONDS_BEYOND_TORCH, f"{best:.2f} s beyond `import torch`"


def test_import_loads_nothing_heavy(probes):
    new = probes[0][0]["new"]
    assert not set(new) & set(HEAVY), new


def test_import_changes_nothing(probes):
    runs, files = probes
    assert all(run["unchanged"] for run in runs), "threads, environment or torch settings changed"
    assert not files, f"import fastdistill wrote {files}"


def test_version_is_the_installed_one():
    from importlib.metadata import version

    import fastdistill

    assert fastdistill.__version__ == version("fastdistill")


# Every loss once on a CPU, forward and backward.
FIRST_CALLS = """
import json, sys
import torch
loaded = set(sys.modules)
import fastdistill as fd
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
teacher = fd.linear_topk(torch.randn(5, 8), torch.randn(40, 8), k=4)
labels = torch.ones(5, dtype=torch.long)
fd.topk_distill_loss(hidden, weight, teacher, labels=labels, ce_weight=0.5).backward()
fd.topk_distill_loss(hidden, weight, teacher, reduction="none").sum().backward()
fd.linear_distill_loss(hidden, weight, torch.randn(5, 8), torch.randn(40, 8)).backward()
fd.linear_lse_gather(hidden, weight, teacher.ids).lse_rest.sum().backward()
fd.token_scores(hidden, weight, labels=labels)
print(json.dumps(sorted(set(sys.modules) - loaded)))
"""


def test_first_calls_of_the_losses_import_only_the_package(tmp_path: Path):
    """torch._dynamo alone would take seconds."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    foreign = {name.partition(".")[0] for name in new} - {*sys.stdlib_module_names, "fastdistill"}
    assert not foreign - {"torch"}, foreign
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch.distributed"))]
