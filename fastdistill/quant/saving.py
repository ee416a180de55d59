"""Saves a quantized model as a portable folder for load_quantized and load_teacher."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.atomic_files import naming_full_disk, sync
from .experts import ExpertStack
from .formats.own_format import KEY, VERSION, metadata, tensors_of
from .formats.tensor_files import INDEX, SINGLE
from .linear import QuantizedWeight
from .matrix import QuantizedMatrix


@torch.no_grad()
def save_quantized(
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 2 << 30,
) -> Path:
    """Save a model of quantize_model or load_quantized: weights, configuration, tokenizer.

    The folder is written atomically: to a temporary folder, which is synced and renamed. The
    tokenizer is saved unless it is None.

    Raises:
        ValueError: nothing in the model is quantized. FileExistsError: the folder is there already.
    """
    path = Path(path)
    if not any(isinstance(m, QuantizedWeight) for m in model.modules()):
        raise ValueError("model: expected quantized layers, found none; use model.save_pretrained")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _not_empty(path)
    with naming_full_disk(path):
        _save(model, path, tokenizer, max_shard_bytes)
    return path


def _not_empty(path: Path) -> FileExistsError:
    return FileExistsError(f"path: expected a new or empty folder, got {path} with content")


def _save(model: PreTrainedModel, path: Path, tokenizer: Any, max_shard_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_weights(model, temporary, max_shard_bytes)
        config = copy.deepcopy(model.config)
        config.quantization_config = {"quant_method": KEY, "version": VERSION}
        config.save_pretrained(str(temporary))
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(str(temporary))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        for file in temporary.iterdir():
            sync(file)
        temporary.chmod(0o755)  # mkdtemp allows the owner only
        try:
            if path.is_dir():
                path.rmdir()
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise _not_empty(path) from None  # another process was faster
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def _write_weights(model: nn.Module, folder: Path, limit: int) -> None:
    """Write shards of about `limit` bytes, and an index if there are several."""
    shards: list[tuple[Path, list[str]]] = []
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}

    def close() -> None:
        file = folder / f"{len(shards)}.safetensors"
        save_file(tensors, file, metadata=metadata(entries))
        shards.append((file, list(tensors)))
        tensors.clear()
        entries.clear()

    size = total = 0
    for new_tensors, new_entries in _stored(model):
        new_bytes = sum(t.nbytes for t in new_tensors.values())
        if tensors and size + new_bytes > limit:
            close()
            size = 0
        tensors |= new_tensors
        entries |= new_entries
        size += new_bytes
        total += new_bytes
    close()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, (file, names) in enumerate(shards):
        final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file.rename(folder / final)
        index["weight_map"] |= dict.fromkeys(names, final)
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _stored(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Yield (tensors, metadata entries) layer by layer; tied weights once."""
    saved: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            stored = name if isinstance(module, ExpertStack) else f"{name}.weight"
            tensors, entry = tensors_of(stored, module.quantized)
            bias = module._buffers.get("bias")
            if bias is not None:
                tensors[f"{name}.bias"] = bias.contiguous()
            yield {k: t.cpu() for k, t in tensors.items()}, {stored: entry}
            continue
        own = dict(module.named_parameters(recurse=False)) | {
            k: b
            for k, b in module.named_buffers(recurse=False)
            if k not in module._non_persistent_buffers_set
        }
        for leaf, tensor in own.items():
            if id(tensor) in saved:
                continue
            saved.add(id(tensor))
            full = f"{name}.{leaf}" if name else leaf
            if isinstance(tensor, QuantizedMatrix):
                tensors, entry = tensors_of(full, tensor.quantized)
                yield {k: t.cpu() for k, t in tensors.items()}, {full: entry}
            else:
                yield {full: tensor.detach().cpu().contiguous()}, {}
