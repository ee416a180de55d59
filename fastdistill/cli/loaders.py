"""Resolve command-line names to teachers and tokenizers; errors that end a command early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..hf.checkpoint import StoredModel, tokenizer_folder
from ..hf.lm_head import rows_of_head
from ..hf.source import model_source, source_of
from ..quant.formats.checkpoint_gate import load_tokenizer
from ..runtime.backend import local_rank
from ..runtime.printable import printable
from ..teachers.local import check_quantization, stored_tokenizer
from ..teachers.open import open_teacher
from ..training.plan.shapes import config_of, empty_model
from ..training.teacher_setup import TeacherSpec


class Failed(Exception):
    """A valid request failed while it ran: exit code 1."""


@contextmanager
def as_exit_code_1(context: str) -> Iterator[None]:
    """Raise Failed for errors of the disk, the network or arithmetic; they are not usage errors."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise Failed(f"{context}: {error}") from error


def silence_transformers() -> None:
    """Turn off the progress bars and warnings of transformers."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def check_device(name: str | None) -> None:
    """Raise ValueError for a device that torch does not know or this machine lacks."""
    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(
            f"device: expected a device of this machine, got {name!r}: {reason}"
        ) from None


def device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def outline_model(role: str, name: str) -> Any:
    """Return the model of a checkpoint on the meta device; raises if its weights are missing."""
    if model_source(role, name).kind != "hub":
        StoredModel.from_path(name, role=role)
    return empty_model(role, config_of(role, name), torch.float32)


def outline_teacher(name: str, quant: str | None, compute: str) -> Any:
    """Return a cache, a client of a server, or the vocabulary and tokenizer of a model."""
    teacher = open_teacher(name, quant=quant, compute=compute)
    if not isinstance(teacher, str):
        return teacher
    if source_of("teacher", name).kind != "hub":
        check_quantization(StoredModel.from_path(name, role="teacher"), quant, compute)
    model = outline_model("teacher", name)
    return TeacherSpec(
        tokenizer=stored_tokenizer(tokenizer_folder(name)), vocab_size=rows_of_head(model)
    )


def open_tokenizer(name: str) -> Any:
    """Return the tokenizer in a folder or of a model on the hub."""
    try:
        return load_tokenizer(tokenizer_folder(name))
    except (OSError, ValueError) as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise ValueError(f"tokenizer: expected a tokenizer in {name}, got none: {reason}") from None
