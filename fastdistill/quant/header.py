"""Checks a configuration against the headers of its checkpoint, before memory is allocated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checkpoint_gate import as_checkpoint_error
from ..runtime.printable import printable
from .conversion import check_no_duplicates, conversion_of
from .tensor_files import CheckpointError, TensorFiles

# A model creates some buffers itself (rotary frequencies, masks), which are smaller than weights.
_LARGEST_BUFFERS = 1 << 30
# Stored weights have at least 4 bits, and a few are not stored (tables of positions).
_MOST_PER_BYTE, _NOT_STORED = 2, 1 << 24
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_")  # prefixes of safetensors' floating-point dtypes


def check_header(
    path: Path,
    config: Any,
    names: Collection[str],
    files: TensorFiles | None = None,
    *,
    stored: int,
) -> None:
    """Raise CheckpointError if a configuration and the stored tensors disagree.

    Args:
        path: of the checkpoint. config: its configuration.
        names: of the stored tensors. files: the shapes and types of plain ones; None checks none.
        stored: bytes of all files with tensors.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(layers) is int and layers > len(names):
        raise CheckpointError(
            f"{path}: num_hidden_layers: expected at most {len(names)}, the number of stored "
            f"tensors, got {layers}. config.json belongs to another checkpoint"
        )
    with (
        as_checkpoint_error(
            path, "the configuration of a causal language model that transformers knows"
        ),
        warnings.catch_warnings(),
        torch.device("meta"),
    ):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    empty = model.state_dict()
    buffers = {name: b.nbytes for name, b in model.named_buffers() if name not in empty}
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PER_BYTE * stored + _NOT_STORED:
        raise CheckpointError(
            f"{path}: expected a configuration of the weights in {stored:,} bytes of tensors, got "
            f"one of {count:,} weights. config.json belongs to another checkpoint"
        )
    if sum(buffers.values()) > max(_LARGEST_BUFFERS, stored):
        largest = max(buffers, key=lambda name: buffers[name])
        raise CheckpointError(
            f"{path}: expected a configuration whose buffers take less memory than the weights, "
            f"got {printable(largest)} of {buffers[largest]:,} bytes. config.json is damaged"
        )
    if files is None:
        return
    conversion = conversion_of(model, names, empty)
    check_no_duplicates(path, conversion)
    for name, ((stored_name, pattern), *others) in conversion.sources.items():
        for each, _ in [(stored_name, pattern), *others]:
            _check_type(files, each, empty[name])
        expected, got = tuple(empty[name].shape), files.shape(stored_name)
        if pattern is None and not others and got != expected:
            raise CheckpointError(
                f"{files.file_of(stored_name)}: tensor {printable(stored_name)}: expected the "
                f"shape {list(expected)} that config.json asks for, got {list(got)}"
            )


def _check_type(files: TensorFiles, name: str, weight: Tensor) -> None:
    """Raise CheckpointError for integers, bools and complex numbers in place of floats.

    They may be quantization codes without scale, which a cast would treat as numbers."""
    kind = files.dtype(name)
    if weight.is_floating_point() and not kind.startswith(_FLOATS):
        raise CheckpointError(
            f"{files.file_of(name)}: tensor {printable(name)}: expected floating point, got "
            f"{printable(kind)}. Is the checkpoint quantized, without a quantization_config?"
        )


def keep_untied(model: PreTrainedModel, tied: Iterable[str]) -> None:
    """Set tie_word_embeddings to False if none of the weights in `tied` is tied any more.

    Otherwise a later tie would overwrite a stored weight."""
    still_tied: set[str] = set(model.all_tied_weights_keys)
    if set(tied) - still_tied and not still_tied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
