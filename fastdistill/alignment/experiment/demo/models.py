"""The demo's models: small Llamas, and the teacher of the package fastdistill_demo_teacher."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from ....runtime.atomic_files import sha256_of
from ....runtime.json_text import read_json
from ....runtime.optional import needs
from ....teachers.local import Teacher
from ....teachers.protocols import TopKTeacher
from ....training.config import DistillConfig
from ....training.trainer import DistillTrainer
from .corpus import END_OF_TEXT

WINDOW = 128
TOKENS_PER_BATCH = 1024  # of the teacher; 4096, its default, takes more time on one thread


@dataclass(frozen=True, kw_only=True)
class Size:
    hidden: int
    layers: int
    heads: int

    @property
    def feed_forward(self) -> int:
        return -(-8 * self.hidden // 3 // 32) * 32


TEACHER = Size(hidden=256, layers=4, heads=4)
STUDENT = Size(hidden=128, layers=2, heads=4)


def new_llama(size: Size, *, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.hidden,
            intermediate_size=size.feed_forward,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=2 * WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Trained(NamedTuple):
    model: LlamaForCausalLM
    history: list[dict[str, float]]  # the Trainer's log, by step
    seconds: float


def train_model(
    model: LlamaForCausalLM,
    windows: torch.Tensor,  # (N, T)
    *,
    teacher: TopKTeacher | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    k: int = 64,
    bf16: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train on the teacher's top k, or on labels alone without a teacher.

    Both use DistillTrainer with the same optimizer, schedule and data order.
    """
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as folder:
        trainer = DistillTrainer(
            model,
            teacher,
            DistillConfig(
                folder,
                k=k,
                ce_weight=1.0 if teacher is None else 0.0,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, min(100, steps // 10)),
                adam_beta2=0.95,
                weight_decay=0.1,
                seed=seed,
                bf16=bf16,
                use_cpu=True,
                save_strategy="no",
                logging_steps=max(1, steps // 60),
                logging_first_step=True,
                disable_tqdm=True,
                report_to=[],
                show_panel=False,
            ),
            train_dataset=[{"input_ids": row} for row in windows],
            callbacks=list(callbacks),
        )
        # The caller shows progress; the history contains the logs.
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Trained(model.eval(), history, seconds)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer so that PreTrainedTokenizerFast loads it."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    # Without the class name, transformers would choose Llama's tokenizer, which splits differently.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def shipped_folder() -> Path:
    """Return the folder of the teacher's checkpoint; raise if its package is not installed."""
    with needs("demo_teacher", "demo"):
        return Path(str(files("fastdistill_demo_teacher"))) / "checkpoint"


def shipped_teacher() -> tuple[Teacher, PreTrainedTokenizerFast, dict[str, Any]]:
    """Load the shipped teacher after checking its files against the manifest."""
    folder = shipped_folder()
    manifest = read_json(folder / "manifest.json", dict)
    for name, digest in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ValueError(
                f"demo_teacher: expected {name} with the sha256 of its manifest, got a damaged or "
                "missing file. Reinstall"
            )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_TEXT
    )
    # Most CPUs have no fast bfloat16 arithmetic; the conversion to fp32 is exact.
    model = LlamaForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    teacher = Teacher(model, tokenizer=tokenizer, tokens_per_batch=TOKENS_PER_BATCH)
    return teacher, tokenizer, manifest
