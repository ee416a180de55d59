"""Opens a checkpoint of any supported kind, as its config and one thunk per weight.

Only headers are read until a thunk is called, so a loader can stream a model of any size with the
memory of its largest tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import awq, bnb, compressed_tensors, fp8, gptq, mxfp4, own_format, torchao
from .gguf import is_quantized_gguf, read_gguf
from .gguf_header import MAGIC, read_headers
from .tensor_files import (
    CheckpointError,
    TensorFiles,
    Thunk,
    fail_checkpoint,
    read_json,
    reading,
    with_plain,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorFiles",
    "is_quantized_checkpoint",
    "open_checkpoint",
]


# (files, config.json, weight, its shape in the model) -> the weight on the meta device
WithoutData = Callable[[TensorFiles, dict[str, Any], str, tuple[int, ...]], Any]


class Format(NamedTuple):
    """A quant_method of config.json: how its tensors are read and recognized."""

    weights: Callable[[TensorFiles, dict[str, Any]], dict[str, Thunk]]
    is_stored: Callable[[TensorFiles], bool]
    has_own_settings: bool = False  # with the tensors, so that config.json may lack them
    notes: Callable[[dict[str, Any]], list[str]] | None = None  # what has no effect here
    expands: Callable[[dict[str, Any]], bool] | None = None  # whether weights are expanded
    without_data: WithoutData | None = None  # None: the reader needs no data


_FORMATS: dict[str, Format] = {
    own_format.KEY: Format(own_format.weights, own_format.is_own_format, True),
    "bitsandbytes": Format(bnb.weights, bnb.is_stored, True, without_data=bnb.without_data),
    "gptq": Format(gptq.weights, gptq.is_stored, without_data=gptq.without_data),
    "awq": Format(awq.weights, gptq.is_stored, without_data=awq.without_data),
    compressed_tensors.KEY: Format(
        compressed_tensors.weights,
        compressed_tensors.is_stored,
        notes=compressed_tensors.notes,
        expands=compressed_tensors.expands,
        without_data=compressed_tensors.without_data,
    ),
    "fp8": Format(
        fp8.weights,
        fp8.is_stored,
        notes=fp8.notes,
        expands=lambda config: True,
        without_data=fp8.without_data,
    ),
    "mxfp4": Format(mxfp4.weights, mxfp4.is_stored, without_data=mxfp4.without_data),
    "torchao": Format(
        torchao.weights,
        torchao.is_stored,
        notes=torchao.notes,
        without_data=torchao.without_data,
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    path: Path  # the folder or file; for a folder with one .gguf file, that file
    config: dict[str, Any]  # config.json, or the equivalent of a .gguf file; {} without either
    method: str | None  # a key of _FORMATS, or "gguf"; None: plain
    weights: dict[str, Thunk]  # by parameter name
    files: TensorFiles | None = None  # None: a .gguf file
    gguf_bytes: int = 0  # of all parts of a .gguf file
    notes: tuple[str, ...] = ()  # what it quantizes besides the weights, which has no effect
    expands: bool = False  # it has FP8 or GGUF's floats, which may be quantized while loading

    @property
    def bytes(self) -> int:
        """The total size of the files with tensors."""
        return self.gguf_bytes if self.files is None else self.files.bytes


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder of safetensors, a .safetensors or a .gguf file, quantized or not.

    Raises:
        CheckpointError: it is missing, damaged, a pickle, or quantized in an unsupported way.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    if gguf is not None:
        model = read_gguf(gguf)
        floats = not model.is_quantized
        return Checkpoint(
            gguf, model.config, "gguf", model.weights, gguf_bytes=model.bytes, expands=floats
        )
    return checkpoint_of(TensorFiles(path))


def checkpoint_of(files: TensorFiles) -> Checkpoint:
    """Return the checkpoint of files; raise CheckpointError as open_checkpoint."""
    path = files.path
    config = read_json(files.config_file) if files.config_file.is_file() else {}
    method = check_stored_method(files, config)
    if method is None:
        return Checkpoint(path, config, None, with_plain(files, {}, ()), files)
    kind = _FORMATS[method]
    weights = kind.weights(files, config)
    notes = tuple(kind.notes(config)) if kind.notes else ()
    expands = kind.expands is not None and kind.expands(config)
    return Checkpoint(path, config, method, weights, files, notes=notes, expands=expands)


def without_data(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Thunk]:
    """Return the weights of a checkpoint of Headers, on the meta device.

    Args:
        shapes: name -> the shape of the model's weight that contains this stored weight.
    """
    files, kind = checkpoint.files, _FORMATS[checkpoint.method or own_format.KEY]
    if files is None or kind.without_data is None:
        return checkpoint.weights
    return {
        name: thunk
        if getattr(thunk, "func", None) == files.read  # stored in full precision
        else functools.partial(
            kind.without_data, files, checkpoint.config, name, shapes.get(name, ())
        )
        for name, thunk in checkpoint.weights.items()
    }


def is_quantized_checkpoint(path: str | Path) -> bool:
    """Whether there is a quantized checkpoint at `path`, supported or not; False for hub names.

    Raises:
        CheckpointError: its headers are damaged.
    """
    path = Path(path)
    if (gguf := _gguf_file(path)) is not None:
        return is_quantized_gguf(read_headers(gguf))
    config_file = path / "config.json"
    if config_file.is_file() and read_json(config_file).get("quantization_config") is not None:
        return True
    stored = (
        path.suffix == ".safetensors" if path.is_file() else any(path.glob("model*.safetensors"))
    )
    return stored and bool(_stored_as(TensorFiles(path)))


def keeps_bits(path: str | Path) -> bool:
    """Whether the checkpoint at `path` is quantized, in a way that loading does not expand.

    Raises:
        CheckpointError: as open_checkpoint.
    """
    if not is_quantized_checkpoint(path):
        return False
    checkpoint = open_checkpoint(path)
    return checkpoint.method is not None and not checkpoint.expands


def is_gguf(path: str | Path) -> bool:
    """Return whether a path is a .gguf file, or a folder with no other weights than one."""
    return _gguf_file(Path(path)) is not None


def _gguf_file(path: Path) -> Path | None:
    """Return `path` if it is a .gguf file, or the only one in a folder without safetensors."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files or any(path.glob("*.safetensors*")):
            return None
        if len(files) > 1:
            got = f"{len(files)} ({', '.join(file.name for file in files)})"
            fail_checkpoint(path, "one .gguf file", got, "pass the path of one")
        return files[0]
    if not path.is_file():
        return None
    with reading(path), path.open("rb") as stream:
        return path if path.suffix == ".gguf" or stream.read(4) == MAGIC else None


def _stored_as(files: TensorFiles) -> tuple[str, ...]:
    """Return the methods that fit the tensor names; GPTQ and AWQ have the same names."""
    methods = tuple(method for method, kind in _FORMATS.items() if kind.is_stored(files))
    return methods[:1] if own_format.KEY in methods else methods


def method_of(settings: dict[str, Any]) -> Any:
    """Return the quant_method of a quantization_config."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"  # older transformers did not write quant_method
    return getattr(method, "value", method)  # of an enum


def check_stored_method(files: TensorFiles, config: dict[str, Any]) -> str | None:
    """Return how the weights are quantized, None if plain, after checking config.json."""
    settings = config.get("quantization_config")
    stored = _stored_as(files)
    if settings is None:
        if stored and not _FORMATS[stored[0]].has_own_settings:
            fail_checkpoint(
                files.config_file,
                f"a quantization_config, because the tensors are those of {' or '.join(stored)}",
                "none",
                "older checkpoints keep it in quantize_config.json or quant_config.json: copy it "
                'here, with its "quant_method"',
            )
        return stored[0] if stored else None
    if not isinstance(settings, dict):
        got = type(settings).__name__
        fail_checkpoint(f"{files.config_file}: quantization_config", "an object", got)
    method = method_of(settings)
    if not isinstance(method, str) or method not in _FORMATS:
        expected = f"one of {tuple(_FORMATS)}, or a .gguf file"
        hint = (
            "use the unquantized checkpoint, and quantize it here; or load it where its package is "
            "installed, dequantize it (model.dequantize() of transformers), and save_pretrained"
        )
        fail_checkpoint(f"{files.config_file}: quant_method", expected, repr(method), hint)
    if method not in stored:
        expected = f"the tensors of {method}, because config.json says so"
        got = f"{' or '.join(stored) or 'plain'} ones"
        fail_checkpoint(files.path, expected, got, "the config belongs to another checkpoint")
    return method
