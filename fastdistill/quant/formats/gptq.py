"""Reads GPTQ checkpoints (Frantar et al. 2022) of 4 and 8 bits, by AutoGPTQ and GPTQModel.

    w[n, k] = (q[n, k] − zero[g(k), n]) · scale[g(k), n],    g(k) = g_idx[k], or k / group_size

A layer X with 4 bits is stored as

    X.qweight   int32 [K/8, N]   bits 4r … 4r+3 of word [i, n] are q[n, 8i + r]
    X.qzeros    int32 [G, N/8]   bits 4r … 4r+3 of word [g, i] are zero[g, 8i + r], less 1 (modulo
                                 16) unless checkpoint_format is "gptq_v2"
    X.scales    fp16  [G, N]
    X.g_idx     int32 [K]        optional; unsorted with act-order (desc_act)
    X.bias      as in a plain layer

and becomes X.weight, a Lut4Weight over the integers with offset = −zero · scale. Both products and
their sum have at most 16 significant bits, so in fp32 q · scale + offset is (q − zero) · scale
exactly.

Each byte of a word, least significant first, holds two consecutive columns, the first one in the
low nibble: swapping nibbles and transposing bytes gives our layout. Act-order columns are sorted by
group once, and `perm` holds their original order.

With 8 bits a word has four bytes instead of eight nibbles, and zero is stored modulo 256. If every
zero is 128, as in symmetric quantization, the layer becomes an Int8Weight of q − 128. Other zeros
and act-order do not fit one, and such a layer is expanded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import Int8Weight, Lut4Weight, table
from .tensor_files import LARGEST, Expanded, TensorFiles, Thunk, integer, reading, with_plain
from .without_data import in_full, int8, lut4

PARTS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")


def is_stored(files: TensorFiles) -> bool:
    return any(name.endswith(".qweight") for name in files.names())


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    with reading(files.config_file, "quantization_config"):
        settings = config["quantization_config"]
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in FORMATS:
            hint = "convert the checkpoint with GPTQModel, or use the unquantized one"
            fail("checkpoint_format", f"one of {FORMATS}", repr(layout), hint)
        bits, group = bits_and_group(settings, (4, 8))
    read = {4: _four_bits, 8: _eight_bits}[bits]
    stored_less = int(layout == "gptq")
    return by_layer(files, functools.partial(read, files, group=group, stored_less=stored_less))


def bits_and_group(settings: dict[str, Any], widths: tuple[int, ...]) -> tuple[int, int]:
    """Return (bits, columns per scale or −1 for all). Call it inside `reading`."""
    bits = integer(settings, "w_bit" if "w_bit" in settings else "bits")
    if bits not in widths:
        expected = " or ".join(map(str, widths))
        fail("bits", expected, bits, "use a checkpoint of that width, or the unquantized one")
    group = integer(settings, "q_group_size" if "q_group_size" in settings else "group_size")
    if group != -1 and not 1 <= group <= LARGEST:
        fail("group_size", "a positive number or -1", group)
    return bits, group


def by_layer(
    files: TensorFiles, read: Callable[[str], Lut4Weight | Int8Weight | Expanded]
) -> dict[str, Thunk]:
    """Return thunks of X.weight for the layers X with a qweight, and of the plain tensors."""
    names = (name for name in files.names() if name.endswith(".qweight"))
    layers = [name.removesuffix(".qweight") for name in names]
    for layer in layers:
        for part in PARTS[:3]:
            files.file_of(f"{layer}.{part}")
    thunks: dict[str, Thunk] = {f"{x}.weight": functools.partial(read, x) for x in layers}
    return with_plain(files, thunks, [f"{layer}.{part}" for layer in layers for part in PARTS])


def _four_bits(files: TensorFiles, layer: str, *, group: int, stored_less: int) -> Lut4Weight:
    name = f"{layer}.qweight"
    words = files.matrix(name, torch.int32, None, None)
    K, N = 8 * words.shape[0], words.shape[1]
    if not N or N % 8 or not K:
        files.fail(name, "[K/8, N] with N a multiple of 8", list(words.shape))
    scale = scales_of(files, layer, N)
    zero = nibbles_of(files, f"{layer}.qzeros", len(scale), N)
    zero = (zero + stored_less) & 15
    groups = _groups(files, layer, K, len(scale), group)
    pairs = words.contiguous().view(torch.uint8).view(K // 8, N, 4).transpose(1, 2).reshape(-1, N)
    perm = None
    if bool((groups[1:] < groups[:-1]).any()):
        groups, perm = groups.sort(stable=True)
        first, second = _columns(pairs, perm[::2]), _columns(pairs, perm[1::2])
        packed = first << 4 | second
    else:
        packed = pairs << 4 | pairs >> 4
    return grouped(files, layer, packed.t(), groups, scale, zero, perm)


def _eight_bits(
    files: TensorFiles, layer: str, *, group: int, stored_less: int
) -> Int8Weight | Expanded:
    name = f"{layer}.qweight"
    words = files.matrix(name, torch.int32, None, None)
    K, N = 4 * words.shape[0], words.shape[1]
    if not N or N % 4 or not K:
        files.fail(name, "[K/4, N] with N a multiple of 4", list(words.shape))
    scale = scales_of(files, layer, N)
    zeros = files.matrix(f"{layer}.qzeros", torch.int32, len(scale), N // 4)
    zero = zeros.reshape(-1).view(torch.uint8).view(len(scale), N) + stored_less  # modulo 256
    groups = _groups(files, layer, K, len(scale), group)
    codes = words.t().reshape(-1).view(torch.uint8).view(N, K)
    if bool((zero != 128).any()) or bool((groups[1:] < groups[:-1]).any()):
        steps = codes.float() - zero.float()[groups].t()
        values = steps.mul_(scale[groups].t())
        kind = "GPTQ of 8 bits with act-order or zeros other than 128"
        return Expanded(values, kind)
    block = _shared_size(groups)
    with reading(files.file_of(name), name):
        return Int8Weight(
            shape=(N, K),
            block=block,
            qdata=(codes ^ 128).view(torch.int8),
            scale=scale[groups[::block]].t().reshape(-1),
        )


def _shared_size(groups: Tensor) -> int:
    """Return the greatest common divisor of the sizes of ascending groups."""
    return math.gcd(*torch.unique_consecutive(groups, return_counts=True)[1].tolist())


def _columns(pairs: Tensor, which: Tensor) -> Tensor:
    """Unpack columns of the weight as rows [len(which), N]; two per byte, low nibble first."""
    return pairs[which // 2] >> (which % 2 * 4).to(torch.uint8)[:, None] & 15


def _groups(files: TensorFiles, layer: str, K: int, count: int, group: int) -> Tensor:
    """Return the row of `scales` of each column: int64 [K]."""
    name = f"{layer}.g_idx"
    if name in files:
        groups = files.matrix(name, torch.int32, K).long()
    else:
        name = f"{layer}.scales"
        groups = torch.arange(K) // (K if group == -1 else group)
    least, most = int(groups.min()), int(groups.max())
    if least < 0 or most >= count:
        expected = f"groups 0 to {count - 1}, the rows of '{layer}.scales'"
        files.fail(name, expected, f"{least} to {most}")
    used = len(set(groups.tolist()))
    if used != count:
        rows = f"{used} rows of '{layer}.scales', one for each group of the {K} columns"
        files.fail(name, f"{rows} (group_size: {group})", f"{count}: some would be unused")
    return groups


def grouped(
    files: TensorFiles,
    layer: str,
    qdata: Tensor,  # uint8 [N, K/2]
    groups: Tensor,  # int64 [K], ascending
    scale: Tensor,  # fp32 [G, N]
    zero: Tensor,  # uint8 [G, N]
    perm: Tensor | None,
) -> Lut4Weight:
    """Return the weight in blocks of the groups' size.

    If groups differ (the last one is shorter if K % group_size ≠ 0), the block is the greatest
    common divisor of their sizes, with repeated scales."""
    K, N = len(groups), scale.shape[1]
    block = _shared_size(groups)
    name = f"{layer}.qweight"
    if block % 2:
        expected = "groups of columns whose sizes share an even divisor"
        got = f"a greatest common divisor of {block}"
        files.fail(name, expected, got, "use the unquantized checkpoint")
    with reading(files.file_of(name), name):
        of_block = groups[::block]
        return Lut4Weight(
            shape=(N, K),
            block=block,
            qdata=qdata.reshape(-1),
            scale=scale[of_block].t().reshape(-1),
            lut=table("int4"),
            offset=(zero.float() * -scale)[of_block].t().reshape(-1),
            perm=perm,
        )


def scales_of(files: TensorFiles, layer: str, N: int) -> Tensor:
    """Return the scales, fp32 [G, N]."""
    name = f"{layer}.scales"
    # With fp32 scales of 24 bits, q · scale and its sum with offset would be inexact.
    dtype = torch.bfloat16 if files.dtype(name) == "BF16" else torch.float16
    return files.matrix(name, dtype, None, N).float()


def nibbles_of(files: TensorFiles, name: str, rows: int, columns: int) -> Tensor:
    """Unpack int32 words of eight nibbles, lowest bits first, to uint8 [rows, columns]."""
    words = files.matrix(name, torch.int32, rows, columns // 8)
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).reshape(rows, columns)


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Lut4Weight | Int8Weight | Expanded:
    """Return a weight on the meta device (without_data.py)."""
    settings, layer = config["quantization_config"], name.removesuffix(".weight")
    with reading(files.config_file, "quantization_config"):
        bits, group = bits_and_group(settings, (4, 8))
    rows, N = files.shape(f"{layer}.qweight")
    K = rows * 32 // bits
    block = math.gcd(K if group == -1 else min(group, K), K)
    ordered = bool(settings.get("desc_act")) and f"{layer}.g_idx" in files and block < K
    if bits == 4:
        return lut4((N, K), block, offset=True, perm=ordered)
    if ordered or not settings.get("sym", True):
        return in_full(N, K)
    return int8((N, K), block)
