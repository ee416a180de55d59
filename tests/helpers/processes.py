"""Shared by test_trainer_distributed and others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

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


def launch(folder: Path, processes: int, kind: str, size: int, accumulation: int, **options):
    """(weights, figures) of a run over so many processes."""
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), str(folder), kind, str(size), str(accumulation)]
    command.append(json.dumps(options))
    base = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path]),
    }
    base |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # DeepSpeed compiles its operators here. In the folder of the user, a lock left by a killed run
    # would make every later run wait forever.
    base["TORCH_EXTENSIONS_DIR"] = str(folder.resolve().parents[1] / "torch_extensions")
    running = [
        subprocess.Popen(
            command,
            env={**base, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(processes)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    figures = json.loads((folder / "figures.json").read_text())
    return torch.load(folder / "weights.pt", weights_only=True), figures
