"""Reads checkpoints of compressed-tensors, which llm-compressor writes.

    w[n, k] = (q[n, k] − zero[n, g]) · scale[n, g]

with a scale for the tensor, each row (channel), each group of columns of a row, or each block of
rows and columns. Each layer X is stored in one of these formats, and a checkpoint may mix them:

    pack-quantized        X.weight_packed int32 [N, K·bits/32], lowest bits first, q + 2^(bits − 1);
                          X.weight_shape = [N, K]; X.weight_zero_point packed along N in the same
                          way, none if symmetric; X.weight_g_idx int32 [K], the group of a column
    int-quantized         X.weight int8 [N, K], X.weight_zero_point int8
    float-quantized       X.weight F8_E4M3 [N, K]
    mxfp8-quantized       the same, with exponents of two as scales
    nvfp4-pack-quantized  X.weight_packed uint8 [N, K/2], X.weight_scale F8_E4M3 [N, K/16],
                          X.weight_global_scale fp32 (microscaling.py)
    mxfp4-pack-quantized  X.weight_packed uint8 [N, K/2], X.weight_scale uint8 [N, K/32], exponents

4-bit integers and floats become Lut4Weight, 8-bit integers Int8Weight of q − zero. So do 4-bit
integers in groups of an odd size, or with zero points and fp32 scales: q · scale + offset would
round twice. What neither represents is expanded: 8-bit floats, differences q − zero that need nine
bits, and act-order with 8 bits.

The tensors of a layer must fit one of the schemes in config_groups. Which one is read from their
types and shapes: the regular expressions of `targets` and `ignore` are not evaluated.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import Int8Weight, Lut4Weight, QuantWeight, table
from .fp8 import expanded, plain_floats, scale_of, tile_of
from .microscaling import microscaled
from .tensor_files import Expanded, TensorFiles, Thunk, integer, reading
from .without_data import in_full, int8, lut4

KEY = "compressed-tensors"
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "dense"),
)
_PACKED, _WEIGHT, _SCALE = ".weight_packed", ".weight", ".weight_scale"
_PARTS = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")
_OF_ACTIVATIONS = tuple(
    f"{what}_{part}"
    for what in ("input", "output", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale")
)
_HINT = (
    "save it without compression: in llm-compressor, model.save_pretrained(folder, "
    "save_compressed=False)"
)


class Scheme(NamedTuple):
    """How the weights of a config group are quantized."""

    bits: int
    kind: str  # "int" | "float"
    strategy: str  # "tensor" | "channel" | "group" | "tensor_group" | "block"
    symmetric: bool
    group: int  # columns per scale; 0 for other strategies
    tile: tuple[int, int] | None  # rows and columns per scale of "block"

    def scale_shapes(self, N: int, K: int) -> list[tuple[int, ...]]:
        """The shapes that the scales of a weight [N, K] may have."""
        if self.strategy == "tensor":
            return [(), (1,), (1, 1)]
        if self.strategy == "channel":
            return [(N,), (N, 1)]
        if self.tile is not None:
            return [(-(-N // self.tile[0]), -(-K // self.tile[1]))]
        return [(N, K // self.group)] if K % self.group == 0 else []

    def __str__(self) -> str:
        size = self.tile or self.group or ""
        zero = "" if self.symmetric else ", zero points"
        return f"{self.kind}{self.bits} by {self.strategy} {size}".rstrip() + zero


def is_stored(files: TensorFiles) -> bool:
    return any(name.endswith((_PACKED, _SCALE)) for name in files.names())


def notes(config: dict[str, Any]) -> list[str]:
    """Return what the config quantizes that is not quantized here."""
    settings = config["quantization_config"]
    lines = []
    for group in settings["config_groups"].values():
        for key in ("input_activations", "output_activations"):
            if isinstance(scheme := group.get(key), dict):
                bits, kind = scheme.get("num_bits"), scheme.get("type")
                lines.append(f"{key} are not quantized to {kind}{bits} here: only the weights are")
    if settings.get("kv_cache_scheme") is not None:
        lines.append("the key-value cache is not quantized here: kv_cache_scheme has no effect")
    return list(dict.fromkeys(lines))


def expands(config: dict[str, Any]) -> bool:
    """Whether some weights are in FP8."""
    schemes = _schemes(config["quantization_config"])
    return any((scheme.kind, scheme.bits) == ("float", 8) for scheme in schemes)


def weights(files: TensorFiles, config: dict[str, Any]) -> dict[str, Thunk]:
    with reading(files.config_file, "quantization_config"):
        schemes = _schemes(config["quantization_config"])
    ends = (_SCALE, _PACKED)
    layers = {n.rpartition(".")[0]: None for n in files.names() if n.endswith(ends)}
    thunks: dict[str, Thunk] = {}
    for layer in layers:
        files.file_of(layer + _SCALE)
        files.file_of(_codes(files, layer))
        thunks[layer + _WEIGHT] = functools.partial(_read, files, schemes, layer)
    parts = [f"{layer}.weight_{part}" for layer in layers for part in _PARTS]
    parts += [n for n in files.names() if n.rpartition(".")[2] in _OF_ACTIVATIONS]
    return plain_floats(files, thunks, parts)


def _schemes(settings: dict[str, Any]) -> list[Scheme]:
    """Return the schemes of config_groups. Call it inside `reading`."""
    formats = [settings.get("format", "dense")]
    schemes = []
    for name, group in settings["config_groups"].items():
        if not isinstance(group, dict):
            fail(f"config_groups.{name}", "an object", type(group).__name__)
        formats.append(group.get("format") or "dense")
        if group.get("weights") is not None:
            schemes.append(_scheme(group["weights"]))
    for written in formats:
        if written not in FORMATS:
            fail("format", f"one of {FORMATS}", repr(written), _HINT)
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        fail("sparsity_config", "the format 'dense'", repr(sparsity), _HINT)
    if (settings.get("transform_config") or {}).get("config_groups"):
        hint = "they are computed in every forward pass: use the unquantized checkpoint"
        fail("transform_config", "no transforms of activations", "some", hint)
    return schemes


def _scheme(args: dict[str, Any]) -> Scheme:
    bits, kind = integer(args, "num_bits"), args.get("type", "int")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 4), ("float", 8)):
        fail("num_bits", "4 or 8 bits of type int or float", f"{bits} of {kind!r}", _HINT)
    group = args.get("group_size")
    inferred = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = args.get("strategy") or inferred
    strategies = ("tensor", "channel", "group", "tensor_group", "block")
    if strategy not in strategies:
        fail("strategy", f"one of {strategies}", repr(strategy))
    symmetric = args.get("symmetric", True)
    if type(symmetric) is not bool:
        fail("symmetric", "true or false", repr(symmetric))
    columns = integer(args, "group_size", 1) if "group" in strategy else 0
    tile = tile_of(_with_list(args), "block_structure") if strategy == "block" else None
    if strategy == "block" and tile is None:
        fail("block_structure", "two positive integers [rows, columns]", "none")
    return Scheme(bits, kind, strategy, symmetric, columns, tile)


def _with_list(args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a block_structure "128x128", of older versions, as a list."""
    block = args.get("block_structure")
    if not isinstance(block, str) or not re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", block):
        return args
    return args | {"block_structure": [int(size) for size in block.split("x")]}


def _codes(files: TensorFiles, layer: str) -> str:
    """Return the name of a layer's codes."""
    return layer + (_PACKED if layer + _PACKED in files else _WEIGHT)


def _read(files: TensorFiles, schemes: list[Scheme], layer: str) -> QuantWeight | Expanded:
    name = _codes(files, layer)
    readers = {"I32": _integers, "I8": _integers, "U8": _fp4, "F8_E4M3": _fp8}
    kind = files.dtype(name)
    if kind not in readers or len(files.shape(name)) != 2:
        expected = f"a matrix of {', '.join(readers)}"
        files.fail(name, expected, f"{list(files.shape(name))} of {kind}")
    if 0 in files.shape(name):
        files.fail(name, "a matrix that is not empty", list(files.shape(name)))
    return readers[kind](files, schemes, layer)


def _scheme_of(
    files: TensorFiles,
    schemes: list[Scheme],
    layer: str,
    kind: str,
    widths: list[int],
    N: int,
    K: int,
) -> Scheme:
    """Return the scheme that fits the types and shapes of a layer's tensors."""
    shape = files.shape(layer + _SCALE)
    symmetric = f"{layer}.weight_zero_point" not in files
    for scheme in schemes:
        same = scheme.kind == kind and scheme.bits in widths and scheme.symmetric == symmetric
        if same and shape in scheme.scale_shapes(N, K):
            return scheme
    expected = f"one of config_groups ({'; '.join(map(str, schemes)) or 'none'})"
    got = (
        f"[{N}, {K}] of {kind} with {' or '.join(map(str, widths))} bits, scales {list(shape)} and "
        f"{'no' if symmetric else 'a'} zero point"
    )
    files.fail(_codes(files, layer), expected, got, "config.json belongs to another checkpoint")


def _fp4(files: TensorFiles, schemes: list[Scheme], layer: str) -> Lut4Weight:
    name = layer + _PACKED
    packed = files.matrix(name, torch.uint8, None, None)
    N, K = packed.shape[0], 2 * packed.shape[1]
    scheme = _scheme_of(files, schemes, layer, "float", [4], N, K)
    if not scheme.group or not scheme.symmetric:
        files.fail(name, "symmetric groups", str(scheme), _HINT)
    scale = scale_of(files, layer + _SCALE)
    global_scale = f"{layer}.weight_global_scale"
    if scheme.strategy == "tensor_group":
        divisor = files.read(global_scale)
        if divisor.numel() != 1 or not divisor.isfinite().all() or not (divisor > 0).all():
            got = f"{list(divisor.shape)}: {divisor.flatten()[:2].tolist()}"
            files.fail(global_scale, "one positive number", got)
        scale = scale / divisor.float().view(())
    with reading(files.file_of(name), name):
        return microscaled(packed, scale, scheme.group)


def _fp8(files: TensorFiles, schemes: list[Scheme], layer: str) -> Expanded:
    name = layer + _WEIGHT
    codes = files.read(name)
    N, K = codes.shape
    scheme = _scheme_of(files, schemes, layer, "float", [8], N, K)
    if not scheme.symmetric:
        files.fail(name, "8-bit floats without zero points", "some", _HINT)
    scale = scale_of(files, layer + _SCALE)
    if scheme.tile is None:
        scale = scale.view(-1, 1) if scale.dim() < 2 else scale
    tile = scheme.tile or (N if len(scale) == 1 else 1, scheme.group or K)
    value = expanded(files, name, codes, scale, tile)
    return Expanded(value.values, f"FP8 with a scale per {scheme.strategy}")


def _integers(files: TensorFiles, schemes: list[Scheme], layer: str) -> QuantWeight | Expanded:
    name = _codes(files, layer)
    q, bits, scheme = _unpacked(files, schemes, layer)
    N, K = q.shape
    scale = scale_of(files, layer + _SCALE)
    scale = scale.view(-1, scale.shape[-1]) if scheme.group else scale.view(-1, 1)
    scale = scale.expand(N, -1)  # [N, G]
    zero = _zero_points(files, layer, scheme, N, scale.shape[1])
    groups = _groups(files, layer, scheme, K)
    block, perm = scheme.group or K, None
    if groups is not None:
        perm = groups.argsort(stable=True)
    exact = zero is None or files.dtype(layer + _SCALE) in ("F16", "BF16")
    if bits == 4 and exact and block % 2 == 0 and K % 2 == 0:
        return four_bits(files, name, q if perm is None else q[:, perm], scale, zero, block, perm)
    of_column = torch.arange(K) // block if groups is None else groups
    steps = q.short() if zero is None else q.short() - zero.short()[:, of_column]
    if perm is None and bool((steps == steps.to(torch.int8)).all()):
        with reading(files.file_of(name), name):
            return Int8Weight(
                shape=(N, K), block=block, qdata=steps.to(torch.int8), scale=scale.reshape(-1)
            )
    kind = f"integers of {bits} bits with zero points or act-order"
    return Expanded(steps.float().mul_(scale[:, of_column]), kind)


def four_bits(
    files: TensorFiles,
    name: str,
    q: Tensor,  # integers [N, K] in −8..7
    scale: Tensor,  # fp32 [N, G]
    zero: Tensor | None,  # int8 [N, G]
    block: int,
    perm: Tensor | None,
) -> Lut4Weight:
    """Return (q − zero) · scale; K and the block are even."""
    codes = (q + 8).to(torch.uint8)
    with reading(files.file_of(name), name):
        return Lut4Weight(
            shape=(q.shape[0], q.shape[1]),
            block=block,
            qdata=(codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1),
            scale=scale.reshape(-1),
            lut=table("q4_0") if zero is None else table("int4"),
            offset=None if zero is None else ((zero.float() + 8) * -scale).reshape(-1),
            perm=perm,
        )


def _unpacked(files: TensorFiles, schemes: list[Scheme], layer: str) -> tuple[Tensor, int, Scheme]:
    """Return (q int8 [N, K], its bits, the scheme) of a layer of integers."""
    name = _codes(files, layer)
    if name.endswith(_WEIGHT):
        q = files.matrix(name, torch.int8, None, None)
        return q, 8, _scheme_of(files, schemes, layer, "int", [8], *q.shape)
    words = files.matrix(name, torch.int32, None, None)
    stored = files.read(f"{layer}.weight_shape")
    if stored.is_floating_point() or stored.dim() != 1 or len(stored) != 2:
        files.fail(f"{layer}.weight_shape", "[N, K]", f"{list(stored.shape)} of {stored.dtype}")
    N, K = stored.tolist()
    widths = [bits for bits in (4, 8) if (len(words), words.shape[1]) == (N, -(-K * bits // 32))]
    if not widths or K < 1:
        got = f"[{N}, {K}], for {name} {list(words.shape)}"
        files.fail(f"{layer}.weight_shape", "[N, K] of packed 4- or 8-bit integers", got)
    scheme = _scheme_of(files, schemes, layer, "int", widths, N, K)
    return _integers_of(words, scheme.bits)[:, :K], scheme.bits, scheme


def _integers_of(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 words, lowest bits first: int8 [rows, columns]."""
    unsigned = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return (unsigned ^ 128).view(torch.int8)
    nibbles = torch.stack([unsigned & 15, unsigned >> 4], -1).view(len(words), -1)
    return nibbles.to(torch.int8) - 8


def _zero_points(files: TensorFiles, layer: str, scheme: Scheme, N: int, G: int) -> Tensor | None:
    """Return the zero points, int8 [N, G], or None."""
    name = f"{layer}.weight_zero_point"
    if name not in files:
        return None
    if files.dtype(name) == "I32":
        words = files.matrix(name, torch.int32, -(-N * scheme.bits // 32), G)
        return _integers_of(words.t(), scheme.bits)[:, :N].t()
    if files.shape(name) != files.shape(layer + _SCALE):
        files.fail(name, f"{list(files.shape(layer + _SCALE))}", list(files.shape(name)))
    zero = files.matrix(name, torch.int8, *files.shape(name))
    return zero.view(-1, G).expand(N, G)


def _groups(files: TensorFiles, layer: str, scheme: Scheme, K: int) -> Tensor | None:
    """Return the group of each column, int64 [K]; None if the columns are in order."""
    name = f"{layer}.weight_g_idx"
    if name not in files:
        return None
    groups = files.matrix(name, torch.int32, K).long()
    if bool((groups == -1).all()) or not scheme.group:  # never set
        return None
    if not torch.equal(groups.sort().values, torch.arange(K) // scheme.group):
        files.fail(name, f"{scheme.group} columns in each of {K // scheme.group} groups", "others")
    return None if bool((groups[1:] >= groups[:-1]).all()) else groups


def without_data(
    files: TensorFiles, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> QuantWeight | Expanded:
    """Return a weight on the meta device (without_data.py); K is that of the model's weight."""
    layer = name.removesuffix(_WEIGHT)
    codes = _codes(files, layer)
    kind, stored = files.dtype(codes), files.shape(codes)
    if len(stored) != 2 or not shape:
        files.fail(codes, "a matrix of the model", list(stored))
    with reading(files.config_file, "quantization_config"):
        schemes = _schemes(config["quantization_config"])
    N, K = stored[0], shape[-1]
    if kind == "F8_E4M3":
        return in_full(N, stored[1])
    if kind == "U8":
        scheme = _scheme_of(files, schemes, layer, "float", [4], N, 2 * stored[1])
        return lut4((N, 2 * stored[1]), scheme.group or K)
    widths = [8] if kind == "I8" else [bits for bits in (4, 8) if -(-K * bits // 32) == stored[1]]
    scheme = _scheme_of(files, schemes, layer, "int", widths, N, K)
    block, has_zeros = scheme.group or K, not scheme.symmetric
    ordered = f"{layer}.weight_g_idx" in files and block < K
    exact = not has_zeros or files.dtype(layer + _SCALE) in ("F16", "BF16")
    if scheme.bits == 4 and exact and block % 2 == 0 and K % 2 == 0:
        return lut4((N, K), block, offset=has_zeros, perm=ordered)
    if ordered or (has_zeros and scheme.bits == 8):
        return in_full(N, K)
    return int8((N, K), block)
