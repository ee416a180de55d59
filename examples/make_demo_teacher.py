"""Train the teacher of `fastdistill demo`, which has a package of its own.

    python examples/make_demo_teacher.py --out demo_teacher/fastdistill_demo_teacher/checkpoint

Takes less than an hour on two CPU cores; the manifest records the time. Trains on the standard
library of the running interpreter, on the training split of
`fastdistill.alignment.experiment.demo.corpus` only.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from fastdistill.alignment.experiment.demo.corpus import (
    document_windows,
    packed_windows,
    standard_library,
    train_tokenizer,
)
from fastdistill.alignment.experiment.demo.models import (
    TEACHER,
    WINDOW,
    new_llama,
    save_tokenizer,
    train_model,
)
from fastdistill.runtime.atomic_files import sha256_of
from fastdistill.runtime.backend import package_versions


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            print(f"step {state.global_step:5d}  loss {logs['loss']:.4f}", file=sys.stderr)


def held_out_nll(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        total = sum(
            model(input_ids=part, labels=part).loss.item() * len(part) for part in ids.split(32)
        )
    return total / len(ids)


def save_teacher(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    manifest: dict[str, Any],
) -> None:
    """Write bfloat16 weights, the tokenizer, and a manifest with the sha256 of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(folder, tokenizer)
    digests = {
        path.name: sha256_of(path)
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    text = json.dumps(manifest | {"sha256": digests}, indent=2, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bfloat16 GEMMs")
    args = parser.parse_args()

    start = time.perf_counter()
    corpus = standard_library()
    tokenizer = train_tokenizer(corpus.train, vocab_size=args.vocab_size)
    windows = packed_windows(corpus.train, tokenizer, length=WINDOW)
    held_out = document_windows(corpus.held_out, tokenizer, length=WINDOW, per_document=8)
    trained = train_model(
        new_llama(TEACHER, vocab_size=args.vocab_size, seed=0),
        windows.ids,
        teacher=None,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=0,
        bf16=not args.fp32,
        callbacks=[PrintLoss()],
    )
    model = trained.model.to(torch.bfloat16).float()  # rounded as it will be stored
    nll = held_out_nll(model, held_out.ids)
    manifest = {
        "what": "the teacher of `fastdistill demo`: a small Llama trained on Python source",
        "made_by": "examples/make_demo_teacher.py",
        "data": f"{corpus.name} {platform.python_version()} (PSF licence), training modules only",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "window": WINDOW,
        "tokens": args.steps * args.batch_size * WINDOW,
        "distinct_tokens": windows.ids.numel(),
        "held_out_nll": round(nll, 4),
        "held_out_tokens": held_out.ids.numel(),
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"python": platform.python_version(), **package_versions()},
    }
    save_teacher(args.out, model, tokenizer, manifest)
    print(f"held-out NLL {nll:.4f} nats per token; written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
