"""From names on a command line to a teacher, a tokenizer, data; and what ends a verb early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..backend import local_rank
from ..checkpoint_gate import load_tokenizer
from ..heads import rows_of_head
from ..plan.shapes import config_of, empty_model
from ..runtime.printable import printable
from ..stored_model import StoredModel, tokenizer_folder
from ..teacher import check_quantization, load_teacher, stored_tokenizer
from ..training.admission import TeacherSpec
from ..training.offline import open_teacher


class Failed(Exception):
    """The request was understood, and what it asked for went wrong: exit code 1."""


@contextmanager
def running(what: str) -> Iterator[None]:
    """From here on a disk, a network or arithmetic that fails is no mistake of the request."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise Failed(f"{what}: {error}") from error


def quiet() -> None:
    """Loading bars of transformers are for a terminal, and so is its advice."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def check_device(name: str | None) -> None:
    """Raise ValueError for a device that torch does not know, or that is not here."""
    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = printable(str(error).partition("\n")[0])
        raise ValueError(f"device: expected one of this machine, got {name!r}: {first}") from None


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def elsewhere(name: str, quant: str | None, compute: str) -> Any:
    """The cache in a folder, or the client of a server; None where the name is a model's."""
    found = open_teacher(name)
    if isinstance(found, (str, Path)):
        return None
    if quant is not None or compute != "auto":
        raise ValueError(
            f"teacher_quant: expected none with {name}, whose answers are made already, got "
            f"{quant or compute!r}"
        )
    return found


def teacher_of(name: str, quant: str | None, compute: str, place: torch.device) -> Any:
    """A teacher that is elsewhere, or else the model."""
    found = elsewhere(name, quant, compute)
    return (
        load_teacher(name, quant=quant, compute=compute, device=place) if found is None else found
    )


def outline(role: str, name: str) -> Any:
    """Return the model of a checkpoint without its weights, which have to be there."""
    config = config_of(role, name)
    if Path(name).expanduser().exists():
        StoredModel.at(name)
    return empty_model(role, config, torch.float32)


def outlined_teacher(name: str, quant: str | None, compute: str) -> Any:
    """Return a teacher that is elsewhere, or else what is known of the model without weights."""
    found = elsewhere(name, quant, compute)
    if found is not None:
        return found
    path = Path(name).expanduser()
    if path.exists():
        check_quantization(StoredModel.at(path), quant, compute)
    if path.suffix == ".gguf":
        return TeacherSpec()
    model = outline("teacher", name)
    return TeacherSpec(
        tokenizer=stored_tokenizer(tokenizer_folder(name)), vocab_size=rows_of_head(model)
    )


def tokenizer_of(name: str) -> Any:
    """Return the tokenizer in a folder, or of a name on the hub."""
    try:
        return load_tokenizer(tokenizer_folder(name))
    except (OSError, ValueError) as error:
        first = printable(str(error).strip().partition("\n")[0])
        raise ValueError(f"tokenizer: expected one in {name}, got none: {first}") from None
