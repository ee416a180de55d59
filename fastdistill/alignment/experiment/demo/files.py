"""Save the demo's teacher, student and text for use with other commands."""

from __future__ import annotations

import json
from pathlib import Path

from ....runtime.atomic_files import write_atomically
from .models import STUDENT, new_llama, save_tokenizer
from .result import DemoSetting


def save_files(folder: Path, setting: DemoSetting) -> None:
    """Write teacher/, student/ (initial weights of seed 0), train.jsonl and held-out.jsonl."""
    student = new_llama(STUDENT, vocab_size=setting.teacher.vocab_size, seed=0)
    for name, model in (("teacher", setting.teacher.model), ("student", student)):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, setting.tokenizer)
    for name, windows in (("train", setting.train), ("held-out", setting.held_out)):
        texts = setting.tokenizer.batch_decode(windows.ids)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(folder / f"{name}.jsonl", "".join(lines))
