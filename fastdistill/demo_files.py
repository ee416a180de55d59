"""Save the demo's teacher, student and text for use with other commands."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpus import Windows
from .demo_models import STUDENT, new_llama, save_tokenizer
from .files import write_atomically


def save_files(
    folder: Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Windows,
    held_out: Windows,
) -> None:
    """Write teacher/, student/ (initial weights of seed 0), train.jsonl and held-out.jsonl."""
    student = new_llama(STUDENT, vocab_size=teacher.config.vocab_size, seed=0)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, tokenizer)
    for name, windows in (("train", train), ("held-out", held_out)):
        texts = tokenizer.batch_decode(windows.ids)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(folder / f"{name}.jsonl", "".join(lines))
