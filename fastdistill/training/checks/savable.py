"""Checks before training that a student can be saved."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, modeling_utils

from ...runtime.printable import printable
from ..student import is_adapted


def check_savable(model: nn.Module, processing_class: Any, args: Any) -> None:
    """Save everything but the weights to a temporary folder, and check the tied weights.

    Raises:
        ValueError: the student, its tokenizer or the arguments cannot be saved.
        OSError: the output folder cannot be written to.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".try-to-save-", dir=folder)
    except OSError as error:
        raise OSError(
            f"output_dir: expected a folder to save in, got {str(folder)!r}: {error}"
        ) from error
    with temporary as name:
        saves: list[tuple[str, Callable[[], object]]] = [
            ("model", lambda: _save_model(model, name)),
            ("processing_class", lambda: _save(processing_class, name)),
            ("args", lambda: torch.save(args, io.BytesIO())),
        ]
        for argument, save in saves:
            try:
                save()
            except Exception as error:  # any error of the libraries would end the run later
                raise ValueError(
                    f"{argument}: expected an object that can be saved, got an error on saving it: "
                    f"{printable(error, 1000)}"
                ) from error


def _save_model(model: Any, folder: str) -> None:
    """Save the configurations; raise the error of save_pretrained for undeclared tied weights."""
    if is_adapted(model):
        for config in model.peft_config.values():
            _save(config, folder)
    else:
        _save(getattr(model, "config", None), folder)
    if not isinstance(model, PreTrainedModel):
        return
    if model.can_generate():
        _save(model.generation_config, folder)
    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if check is not None:
        check(model.state_dict(), model)


def _save(item: Any, folder: str) -> None:
    if item is not None:
        item.save_pretrained(folder)


_HASH = "_original_object_hash"


def has_loaded_generation_config(model: Any) -> bool:
    """Return whether the generation config is unchanged since the model was loaded.

    transformers saves an unchanged config even if it is inconsistent, as some published ones are,
    but refuses to save it after a change.
    """
    generation = getattr(model, "generation_config", None)
    return generation is not None and getattr(generation, _HASH, None) == hash(generation)


def keep_generation_config_savable(model: Any) -> None:
    """Mark the generation config as unchanged, after the Trainer set special tokens in it."""
    setattr(model.generation_config, _HASH, hash(model.generation_config))
