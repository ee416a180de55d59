"""Reads checkpoints in 8-bit floats with a scale per tile: DeepSeek-V3's, Qwen3-FP8, transformers'.

    w[n, k] = fp8[n, k] · scale_inv[n / 128, k / 128]

A weight X, of a layer or of stacked experts, is stored as

    X                 F8_E4M3 [..., N, K]
    X_scale_inv       fp32, bf16 or E8M0 [..., N/128, K/128], rounded up; a number without
                      weight_block_size
    X.activation_scale, X.input_scale    of layers with static scales, which are not used here

Neither LUT4 nor INT8 holds 256 floating-point values, so that weights are expanded: the product in
fp32, as in transformers and DeepSeek's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from .microscaling import powers_of_two
from .tensor_files import Expanded, TensorFiles, Thunk, reading, with_plain
from .without_data import in_full

_SCALE = "_scale_inv"
_ACTIVATIONS = ("activation_scale", "input_scale")
_DTYPE = "F8_E4M3"


def is_stored(files: TensorFiles) -> bool:
    return any(name.endswith(_SCALE) for name in files.names())


def notes(config: dict[str, Any]) -> list[str]:
    return ["activations are not quantized to FP8 here: only the weights are"]


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    with reading(files.config_file, "quantization_config"):
        settings = config["quantization_config"]
        fmt = settings.get("fmt") or "e4m3"
        if fmt != "e4m3":
            fail("fmt", "'e4m3'", repr(fmt), "use the unquantized checkpoint")
        tile = tile_of(settings, "weight_block_size")
    names = [name.removesuffix(_SCALE) for name in files.names() if name.endswith(_SCALE)]
    for name in names:
        files.file_of(name)
    thunks: dict[str, Thunk] = {n: functools.partial(_read, files, n, tile) for n in names}
    layers = [name.removesuffix(".weight") for name in names]
    parts = [f"{layer}.{part}" for layer in layers for part in _ACTIVATIONS]
    return plain_floats(files, thunks, [*parts, *(n + _SCALE for n in names)])


def tile_of(settings: dict[str, Any], key: str) -> tuple[int, int] | None:
    """Return the rows and columns of a tile, None for one scale. Call it inside `reading`."""
    tile = settings.get(key)
    if tile is None:
        return None
    if (
        not isinstance(tile, list)
        or len(tile) != 2
        or not all(type(n) is int and 0 < n < 1 << 20 for n in tile)
    ):
        fail(key, "two positive integers [rows, columns]", repr(tile))
    return tile[0], tile[1]


def plain_floats(
    files: TensorFiles, thunks: dict[str, Thunk], parts: Sequence[str]
) -> dict[str, Thunk]:
    """Return `with_plain`, after checking that no plain tensor is in 8 bits without a scale."""
    weights = with_plain(files, thunks, parts)
    for name in weights.keys() - thunks.keys():
        if files.dtype(name).startswith(("F8_", "I8", "U8")):
            got = f"{files.dtype(name)} without one"
            files.fail(name, "a scale with a weight of 8 bits", got, "the checkpoint is incomplete")
    return weights


def _read(files: TensorFiles, name: str, tile: tuple[int, int] | None) -> Expanded:
    if files.dtype(name) != _DTYPE:
        files.fail(name, f"{_DTYPE}, since it has a {_SCALE[1:]}", files.dtype(name))
    scale = scale_of(files, name + _SCALE)
    return expanded(files, name, files.read(name), scale, tile)


def scale_of(files: TensorFiles, name: str) -> Tensor:
    """Return stored scales in fp32; bytes are exponents of two (E8M0)."""
    stored = files.read(name)
    with reading(files.file_of(name), name):
        if stored.dtype == torch.uint8:
            return powers_of_two(stored)
        if not stored.is_floating_point():
            fail("scale", "floating point or E8M0", stored.dtype)
        return stored.float()


def expanded(
    files: TensorFiles, name: str, codes: Tensor, scale: Tensor, tile: tuple[int, int] | None
) -> Expanded:
    """Return fp8 · scale, with a scale for each tile; without a tile, one for all.

    Args:
        name: of the codes, F8_E4M3 [..., N, K]. scale: fp32 [..., N/rows, K/columns], rounded up.
    """
    if tile is None:
        if scale.numel() != 1:
            files.fail(name, "one scale, without the size of a block", list(scale.shape))
        return Expanded(codes.float() * scale.view(()), "FP8")
    if codes.dim() < 2:
        files.fail(name, "[..., N, K]", list(codes.shape))
    (rows, columns), (N, K) = tile, codes.shape[-2:]
    shape = (*codes.shape[:-2], -(-N // rows), -(-K // columns))
    if tuple(scale.shape) != shape:
        expected = f"scales {list(shape)} for {list(codes.shape)} in blocks of {rows} × {columns}"
        files.fail(name, expected, list(scale.shape))
    values = codes.float()
    if shape[-1] > 1:
        scale = scale.repeat_interleave(columns, -1)[..., :K]
    if rows == 1:
        values *= scale
    else:
        for i in range(shape[-2]):
            values[..., i * rows : (i + 1) * rows, :] *= scale[..., i : i + 1, :]
    return Expanded(values, f"FP8 in blocks of {rows} × {columns}")


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Expanded:
    """Return a weight on the meta device (without_data.py)."""
    return in_full(*files.shape(name))
