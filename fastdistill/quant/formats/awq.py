"""Reads 4-bit AWQ checkpoints (Lin et al. 2023) in AutoAWQ's layout "gemm".

    w[n, k] = (q[n, k] − zero[g, n]) · scale[g, n],    g = k / group_size

A layer X is stored as

    X.qweight   int32 [K, N/8]   bits 4r … 4r+3 of word [k, i] are q[8i + ORDER[r], k]
    X.qzeros    int32 [G, N/8]   the same for zero
    X.scales    fp16  [G, N]

and becomes X.weight like a GPTQ layer (read_gptq). The other layouts ("gemv", "gemv_fast",
"llm-awq") permute the same numbers for one kernel each.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import Lut4Weight
from .gptq import bits_and_group, by_layer, grouped, nibbles_of, scales_of
from .tensor_files import TensorFiles, Thunk, reading
from .without_data import lut4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = [ORDER.index(n) for n in range(8)]  # which nibble of a word holds its n-th row


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    with reading(files.config_file, "quantization_config"):
        settings = config["quantization_config"]
        layout = settings.get("version") or settings.get("format") or "gemm"
        if str(layout).lower() != "gemm":
            hint = "save it as 'gemm', or use the unquantized checkpoint"
            fail("version", "'gemm'", repr(layout), hint)
        _, group = bits_and_group(settings, (4,))
    return by_layer(files, functools.partial(_read, files, group=group))


def _read(files: TensorFiles, layer: str, *, group: int) -> Lut4Weight:
    name = f"{layer}.qweight"
    words = files.matrix(name, torch.int32, None, None)
    K, N = words.shape[0], 8 * words.shape[1]
    if not N or not K or K % 2:
        files.fail(name, "[K, N/8] with an even K", list(words.shape))
    scale = scales_of(files, layer, N)
    groups = torch.arange(K) // (K if group == -1 else group)
    if len(scale) != groups[-1] + 1:
        expected = f"{groups[-1].item() + 1} rows for {K} columns in groups of {group}"
        files.fail(f"{layer}.scales", expected, len(scale))
    zero = _in_order(nibbles_of(files, f"{layer}.qzeros", len(scale), N))
    # Of two columns k and k + 1: their low nibbles into one byte, their high ones into the next.
    even, odd = words.contiguous().view(torch.uint8).view(K // 2, 2, N // 2).unbind(1)
    pairs = torch.stack([even << 4 | odd & 15, even & 240 | odd >> 4], -1).view(K // 2, N)
    return grouped(files, layer, _in_order(pairs).t(), groups, scale, zero, None)


def _in_order(stored: Tensor) -> Tensor:  # [any, N], in the order of the words' nibbles
    return stored.view(len(stored), -1, 8)[..., _PLACE].reshape(stored.shape)


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Lut4Weight:
    """Return a weight on the meta device (without_data.py)."""
    with reading(files.config_file, "quantization_config"):
        _, group = bits_and_group(config["quantization_config"], (4,))
    K, words = files.shape(f"{name.removesuffix('.weight')}.qweight")
    block = math.gcd(K if group == -1 else min(group, K), K)
    return lut4((8 * words, K), block, offset=True)
