"""Two processes make the update that one makes, and evaluate every example exactly once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
]

WORKER = """
import json, os, sys
from pathlib import Path
import torch
from training import config, llama, ragged
from fastdistill import DistillTrainer

out, size, accumulation = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
args = config(out, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
              per_device_eval_batch_size=2)
trainer = DistillTrainer(llama(0), llama(7, hidden=48, scale=20.0), args,
                         train_dataset=ragged(12), eval_dataset=ragged(7))
trainer.train()
metrics = trainer.evaluate()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
if trainer.is_world_process_zero():
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), out / "weights.pt")
    (out / "figures.json").write_text(json.dumps({"metrics": metrics, "logs": logs}))
trainer.accelerator.end_training()
# Past this point only native threads of torch and gloo are torn down, and about one process in ten
# aborts there ("terminate called without an active exception", no Python frame).
sys.stderr.flush()
os._exit(0)
"""


def launch(folder: Path, processes: int, size: int, accumulation: int):
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), str(folder), str(size), str(accumulation)]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    base |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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


def test_two_processes_make_the_same_update(tmp_path):
    one, alone = launch(tmp_path / "one", 1, 12, 1)
    two, together = launch(tmp_path / "two", 2, 3, 2)
    assert (one - two).abs().max() < 1e-6
    for ours, theirs in zip(alone["logs"], together["logs"], strict=True):
        for name in ("loss", "divergence", "nll", "teacher_mass", "student_mass"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # Seven examples over two processes: one is read twice, and must be counted once.
    for name in ("loss", "kl", "nll", "top1", "agreement", "teacher_mass"):
        ours, theirs = alone["metrics"][f"eval_{name}"], together["metrics"][f"eval_{name}"]
        assert ours == pytest.approx(theirs, rel=1e-5), name
