"""Quantization-aware distillation of a trained model, compared with rounding once (PTQ).

The student is the demo's teacher (4 layers, H=256, trained on Python's standard library) with
fake-quantized weights; its teacher is the same model in full precision. It trains on the library's
training files. KL(full ‖ quantized) is measured on held-out files, in nats per token at T=1 over
the whole vocabulary. Intervals resample the held-out files.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import numpy as np
import torch

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from fastdistill.alignment.statistics.bootstrap import paired_bootstrap
from fastdistill.quant import fake_quantize
from fastdistill.training.loss import EVAL_COLUMNS

from .rows import Row
from .shapes import Shape

SCHEMES = ("nvfp4", "int4")
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 10, 8, 64
LEARNING_RATE = 1e-4
SHAPE = Shape(N=32, H=256, V=2048, K=0)  # N: held-out sequences of 64 tokens


def rows(shape: Shape = SHAPE) -> list[Row]:
    results = []
    teacher, tokenizer, _ = shipped_teacher()
    text = corpus.standard_library()
    held_out = corpus.document_windows(text.held_out, tokenizer, length=LENGTH, per_document=2)
    for scheme in SCHEMES:
        before, after = [], []
        for seed in SEEDS:
            train = corpus.packed_windows(
                text.train, tokenizer, length=LENGTH, max_windows=STEPS * BATCH, seed=seed
            )
            first, last = distilled(teacher, scheme, seed, train.ids, _first(held_out, shape.N))
            before.append(first)
            after.append(last)
            results.append(_row(shape, f"{scheme}, QAD, seed {seed}", last, np.zeros_like(last)))
        results.append(_row(shape, f"{scheme}, PTQ", before[0], np.zeros_like(before[0])))
        mean = np.mean(after, axis=0)
        results.append(_row(shape, f"{scheme}, QAD − PTQ, mean of seeds", mean, before[0]))
    return results


def distilled(
    teacher: fd.Teacher, scheme: str, seed: int, train: torch.Tensor, held_out: corpus.Windows
) -> tuple[np.ndarray, np.ndarray]:
    """Return the KL of each held-out file before and after training, nats per token."""
    student: Any = copy.deepcopy(teacher.model).requires_grad_(True)
    fake_quantize(student, scheme)
    with tempfile.TemporaryDirectory() as folder:
        trainer = fd.DistillTrainer(
            student,
            teacher,
            fd.DistillConfig(
                folder,
                k=None,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=STEPS // 10,
                seed=seed,
                save_strategy="no",
                logging_steps=STEPS,
                report_to=[],
                show_panel=False,
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=[{"input_ids": ids} for ids in train],
        )
        examples = [{"input_ids": ids} for ids in held_out.ids]
        owners = held_out.document.numpy()
        before = _kl_of_documents(trainer, examples, owners)
        trainer.train()
        return before, _kl_of_documents(trainer, examples, owners)


def _first(windows: corpus.Windows, sequences: int) -> corpus.Windows:
    return windows._replace(ids=windows.ids[:sequences], document=windows.document[:sequences])


def _kl_of_documents(trainer: Any, examples: list[Any], owners: np.ndarray) -> np.ndarray:
    sums = trainer.predict(examples).predictions
    kl, tokens = (sums[:, EVAL_COLUMNS.index(name)] for name in ("kl", "tokens"))
    return np.array([kl[owners == i].sum() / tokens[owners == i].sum() for i in np.unique(owners)])


def _row(shape: Shape, name: str, values: np.ndarray, reference: np.ndarray) -> Row:
    row = Row.at(shape, "qad", name, "training", "float32")
    estimate = paired_bootstrap(values.tolist(), reference.tolist())
    row.kl, row.kl_low, row.kl_high = estimate.value, estimate.low, estimate.high
    return row


def table(rows: list[Row]) -> str:
    lines = [f"{'quantization-aware distillation':34} {'KL, nats/token':>15} {'95 %':>22}"]
    for row in rows:
        interval = f"[{row.kl_low:.5f}, {row.kl_high:.5f}]"
        lines.append(f"{row.impl:34} {row.kl:15.5f} {interval:>22}")
    return "\n".join(lines)
