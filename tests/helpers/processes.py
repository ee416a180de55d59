"""Shared by test_trainer_distributed and others."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# What the modules of tests import. Those cannot be in this list: the server of Python 3.11 does not
# get sys.path, and it ignores a module that it does not find.
PRELOAD = [
    "pytest",
    "transformers.models.llama.modeling_llama",
    "fastdistill.teachers.cache",
    "fastdistill.training.trainer",
]

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from helpers import on_cpu
from helpers.training import build, llama, ragged
from fastdistill.training.logs.run_files import read_run

out, kind = Path(sys.argv[1]), sys.argv[2]
size, accumulation = int(sys.argv[3]), int(sys.argv[4])
options = json.loads(sys.argv[5])
world = int(os.environ["WORLD_SIZE"])
tied = options.pop("tied", False)
model = llama(0, tied=tied)
if world > 1 and kind in on_cpu.SETUPS:
    model = on_cpu.SETUPS[kind](model, options, out)
trainer = build(out, model=model, per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation, per_device_eval_batch_size=2,
                data=ragged(12), eval_dataset=ragged(7), **options)
trainer.train()
seen = on_cpu.seen(trainer)
metrics = trainer.evaluate()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
weights = on_cpu.whole(trainer)
if trainer.is_world_process_zero():
    torch.save(weights, out / "weights.pt")
    counts = read_run(out / "run").events("histograms")[-1]["counts"]
    figures = {"metrics": metrics, "logs": logs, "seen": seen, "counts": counts}
    (out / "figures.json").write_text(json.dumps(figures))
trainer.accelerator.end_training()
# Past this point only native threads of torch and gloo are torn down, and about one process in ten
# aborts there ("terminate called without an active exception", no Python frame).
sys.stderr.flush()
os._exit(0)
"""


def forkserver() -> Any:
    """The context of processes that start without importing torch and transformers again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Script:
    """A Python file that runs as a command in a process of `forkserver`."""

    def __init__(self, *command: object, output: Path, **environment: object) -> None:
        """Start it; its output goes to OUTPUT.stdout and OUTPUT.stderr."""
        self.command = [str(word) for word in command]
        self.files = [output.with_suffix(suffix) for suffix in (".stdout", ".stderr")]
        variables = {"OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}}
        arguments = (self.command, self.files, variables)
        self.process = forkserver().Process(target=_run, args=arguments)
        self.process.start()

    def wait(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Return its exit code and output; kill it after so many seconds."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        output = [file.read_text(encoding="utf-8") for file in self.files]
        return subprocess.CompletedProcess(self.command, self.process.exitcode, *output)


def _run(command: list[str], files: list[Path], environment: dict[str, str]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def run_ranks(world: int, source: str, *arguments: object, folder: Path) -> None:
    """Run a script in so many ranks of a group on this machine."""
    script = folder / "worker.py"
    script.write_text(source)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
    # DeepSpeed compiles its operators here. In the folder of the user, a lock left by a killed run
    # would make every later run wait forever.
    group["TORCH_EXTENSIONS_DIR"] = folder.resolve().parents[1] / "torch_extensions"
    running = [
        Script(
            script,
            *arguments,
            output=folder / f"rank-{rank}",
            **{**group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in range(world)
    ]
    for each in running:
        done = each.wait(240)
        assert done.returncode == 0, done.stderr


def launch(folder: Path, processes: int, kind: str, size: int, accumulation: int, **options):
    """(weights, figures) of a run over so many processes."""
    folder.mkdir()
    arguments = (folder, kind, size, accumulation, json.dumps(options))
    run_ranks(processes, WORKER, *arguments, folder=folder)
    figures = json.loads((folder / "figures.json").read_text())
    return torch.load(folder / "weights.pt", weights_only=True), figures
