"""Checks a configuration against the headers of its checkpoint, before memory is allocated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from .checkpoint_gate import as_checkpoint_error
from .conversion import check_no_duplicates, conversion_of
from .tensor_files import TensorFiles, fail_checkpoint

# A model creates some buffers itself (rotary frequencies, masks), which are smaller than weights.
_LARGEST_BUFFERS = 1 << 30
# Stored weights have at least 4 bits, and a few are not stored (tables of positions).
_MOST_PER_BYTE, _NOT_STORED = 2, 1 << 24
_OTHER = "config.json belongs to another checkpoint"
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
        expected = f"at most {len(names)}, the number of stored tensors"
        fail_checkpoint(f"{path}: num_hidden_layers", expected, layers, _OTHER)
    with (
        as_checkpoint_error(
            path, "the configuration of a causal language model that transformers knows"
        ),
        warnings.catch_warnings(),
        torch.device("meta"),
        set_zero3_state(),  # or DeepSpeed would partition the empty model
    ):
        warnings.simplefilter("ignore")
        model = auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=False)
    empty = model.state_dict()
    buffers = {name: b.nbytes for name, b in model.named_buffers() if name not in empty}
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PER_BYTE * stored + _NOT_STORED:
        expected = f"a configuration of the weights in {stored:,} bytes of tensors"
        fail_checkpoint(path, expected, f"one of {count:,} weights", _OTHER)
    if sum(buffers.values()) > max(_LARGEST_BUFFERS, stored):
        largest = max(buffers, key=lambda name: buffers[name])
        expected = "a configuration whose buffers take less memory than the weights"
        got = f"{largest} of {buffers[largest]:,} bytes"
        fail_checkpoint(path, expected, got, "config.json is damaged")
    if files is None:
        return
    conversion = conversion_of(model, names, empty)
    check_no_duplicates(path, conversion)
    for name, sources in conversion.sources.items():
        (stored_name, pattern), *others = sources
        for each, _ in sources:
            _check_type(files, each, empty[name])
        shape, stored_shape = tuple(empty[name].shape), files.shape(stored_name)
        if pattern is None and not others and stored_shape != shape:
            expected = f"the shape {list(shape)} that config.json asks for"
            files.fail(stored_name, expected, list(stored_shape))


def auto_class(config: Any) -> Any:
    """Return AutoModelForCausalLM, or AutoModelForImageTextToText for a vision model alone."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    reads_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def _check_type(files: TensorFiles, name: str, weight: Tensor) -> None:
    """Raise CheckpointError for integers, bools and complex numbers in place of floats.

    They may be quantization codes without scale, which a cast would treat as numbers."""
    kind = files.dtype(name)
    if weight.is_floating_point() and not kind.startswith(_FLOATS):
        hint = "is the checkpoint quantized, without a quantization_config?"
        files.fail(name, "floating point", kind, hint)


def keep_untied(model: PreTrainedModel, tied: Iterable[str]) -> None:
    """Set tie_word_embeddings to False if none of the weights in `tied` is tied any more.

    Otherwise a later tie would overwrite a stored weight."""
    still_tied: set[str] = set(model.all_tied_weights_keys)
    if set(tied) - still_tied and not still_tied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
