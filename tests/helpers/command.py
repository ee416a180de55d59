"""The command line called in this process, and small files for it to work on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

from fastdistill.alignment.experiment.demo import corpus
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from fastdistill.alignment.experiment.demo.result import DemoSetting
from fastdistill.alignment.experiment.demo.run import save_files
from fastdistill.cli import main


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `fastdistill …`."""
    monkeypatch.setattr("sys.argv", ["fastdistill", *map(str, arguments)])
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def last_values(*arguments: object) -> tuple[object, ...]:
    """The arguments without each KEY=VALUE whose key comes again."""
    keys = [str(word).partition("=")[0] if "=" in str(word) else None for word in arguments]
    repeated = [key is not None and key in keys[i + 1 :] for i, key in enumerate(keys)]
    return tuple(word for word, again in zip(arguments, repeated, strict=True) if not again)


def files(folder: Path, rows: int = 12) -> Path:
    """A folder with teacher, student, train.jsonl and held-out.jsonl, as the demo leaves it."""
    teacher, tokenizer, _ = shipped_teacher()
    text = corpus.standard_library()
    train = corpus.packed_windows(text.train[:20], tokenizer, length=32, max_windows=rows)
    held_out = corpus.packed_windows(text.held_out[:5], tokenizer, length=32, max_windows=4)
    setting = DemoSetting(teacher, tokenizer, train, held_out, {})
    save_files(folder, setting)
    return folder
