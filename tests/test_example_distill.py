"""The example script trains from files and resumes on its own; the files beside it are valid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill.alignment.experiment.demo.models import shipped_folder, shipped_teacher
from fastdistill.training.checkpoints import last_finished
from fastdistill.training.logs.run_files import read_run
from helpers.present import present

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = shipped_teacher()[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    text = [{"prompt": f"def f{i}(x):", "completion": f"\n    return x + {i}"} for i in range(16)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, text)) + "\n")
    return folder


def run(files, out, *more):
    command = [
        sys.executable,
        EXAMPLES / "distill.py",
        "--student",
        files / "student",
        "--teacher",
        shipped_folder(),
        "--data",
        files / "train.jsonl",
        "--output_dir",
        out,
        "--use_cpu",
        "--k",
        "16",
        "--per_device_train_batch_size",
        "4",
        "--logging_steps",
        "1",
        *more,
    ]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_it_trains_and_resumes(files, tmp_path):
    pytest.importorskip("peft")
    more = ("--save_steps", "2", "--packing", "--token_selection", "entropy top 0.5")
    run(files, tmp_path, "--max_steps", "3", "--lora_rank", "2", *more)
    assert present(last_finished(tmp_path)).name == "checkpoint-3"
    output = run(
        files,
        tmp_path,
        "--max_steps",
        "5",
        "--lora_rank",
        "2",
        "--eval_data",
        files / "eval.jsonl",
        *more,
    )
    assert "covered teacher mass" in output
    metrics = read_run(tmp_path).metrics
    assert [e["step"] for e in metrics if "loss" in e] == [1, 2, 3, 4, 5]
    assert metrics[-1]["eval_kl"] > 0
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "| token_selection | entropy top 0.5 |" in (tmp_path / "README.md").read_text()


def test_the_files_beside_it_are_valid():
    assert json.loads((EXAMPLES / "zero3.json").read_text())["zero_optimization"]["stage"] == 3
    fsdp = yaml.safe_load((EXAMPLES / "fsdp2.yaml").read_text())
    assert fsdp["fsdp_config"]["fsdp_version"] == 2
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)


def test_every_option_in_the_commands_exists():
    from dataclasses import fields

    from fastdistill import DistillConfig

    script = (EXAMPLES / "distill.py").read_text()
    known = {f.name for f in fields(DistillConfig)}
    known |= set(re.findall(r"^    (\w+): .*field\(", script, re.M))
    for name in ("many_gpus.md", "slurm.sh", "distill.py"):
        text = (EXAMPLES / name).read_text()
        after = re.findall(r"examples/distill\.py((?:[^\n]|\\\n)*)", text)
        assert after or name == "distill.py"
        for option in re.findall(r"--(\w+)", " ".join(after)):
            assert option in known, (name, option)
