"""Reads models in .gguf files (llama.cpp).

Matrices of the layers, the embedding and the head stay in 4 or 8 bits if their type is one of the
two formats bit for bit (gguf_types.py). Everything else is expanded to fp32: matrices of Q5_1 and
Q5_K, and norms of any type. A file may mix types: Q4_K_M is Q4_K with some matrices and the head in
Q6_K. F16 and BF16 are read as they are. The log, at level INFO, has the memory of each type.

Tensor names differ from transformers, and some families store other rows or norms (gguf_names.py).
Unknown tensors raise an error. gguf_config.py makes the config.
"""

from __future__ import annotations

import functools
import logging
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import QuantWeight, take_rows
from .gguf_config import ROPE, read_config
from .gguf_header import GGUFHeader, GGUFTensor, read_headers
from .gguf_metadata import instead
from .gguf_names import FAMILIES, GATE_UP, GATE_UP_BIAS, NEXTN, Family, family_of
from .gguf_types import expanded, quantized
from .gguf_value_heads import Order, ValueHeads
from .tensor_files import Expanded, Thunk, fail_checkpoint, reading

logger = logging.getLogger(__name__)

_MATRIX = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output|gate)|ssm_(alpha|beta|out)|shortconv\.(in|out)_proj"
    r"|ffn_(gate|up|down)(_exps|_shexp|\.\d+)?)\.weight"
)
_EXPERT = r"(?<=ffn_gate|ffn_down)\.\d+\.|(?<=ffn_up)\.\d+\."  # of files before April 2024
_HEADS = {"q": "attention", "k": "key_value"}
_ENDS = ("token_embd.weight", "output.weight")  # the embedding and the head
# Other architectures that transformers 5.23 reads with all their tensors.
_EXPANDED_BY_TRANSFORMERS = ("falcon", "nemotron")
_EXPAND = (
    "import sys, transformers as t; at, file, out = sys.argv[1:]; "
    "m = t.AutoModelForCausalLM.from_pretrained(at, gguf_file=file, "
    "quantization_config=t.GgufConfig(dequantize=True)); "
    "m.save_pretrained(out); "
    "t.AutoTokenizer.from_pretrained(at, gguf_file=file).save_pretrained(out)"
)
_CHUNK = 1 << 16  # values unpacked at a time: larger temporaries fragment the heap


class GGUFModel(NamedTuple):
    """config: for transformers. weights: a thunk for each parameter. bytes: of all files."""

    config: dict[str, Any]
    weights: dict[str, Thunk]
    bytes: int
    is_quantized: bool


def read_gguf(file: Path) -> GGUFModel:
    """Return the model in a file, or in the parts that it belongs to.

    Only headers and rotary factors are read until a thunk is called. The log says which types stay
    quantized, which are expanded, and the memory of both."""
    header = read_headers(file)
    file = header.files[0]
    name = header.fields.get("general.architecture")
    if name not in FAMILIES:
        expected = f"one of {tuple(FAMILIES)}, whose layout is known"
        hint = instead(header.fields)
        if name in _EXPANDED_BY_TRANSFORMERS:
            at = f"{shlex.quote(str(file.parent))} {shlex.quote(file.name)} expanded"
            hint += f", or expand the file with transformers: python -c {shlex.quote(_EXPAND)} {at}"
        fail_checkpoint(f"{file}: general.architecture", expected, repr(name), hint)
    family = family_of(header.fields, name)
    header = _without_later_layers(header, name)
    parts: dict[str, list[str]] = defaultdict(list)
    factors = {}
    for stored, tensor in header.tensors.items():
        if stored in ROPE:
            factors[stored] = _dense(stored, tensor).flatten()
        else:
            parts[_parameter(tensor.file, stored, family, header.fields)].append(stored)
    config = read_config(file, header, name, factors)
    weights: dict[str, Thunk] = {}
    for parameter, names in parts.items():
        tensors = {stored: header.tensors[stored] for stored in names}
        first = tensors[names[0]]
        if parameter.endswith((GATE_UP, GATE_UP_BIAS)):
            weights[parameter] = functools.partial(_gate_up, file, tensors, family.alternating)
        elif re.search(_EXPERT, names[0]):
            weights[parameter] = functools.partial(_stack, file, tensors, ("down",))
        elif "*" in parameter:  # the norms of each head of StableLM
            for row in range(first.shape[0]):
                weights[parameter.replace("*", str(row))] = functools.partial(
                    _row, names[0], first, row
                )
        else:
            weights[parameter] = _one(parameter, names[0], first, family, config)
        if family.alternating and names[0].endswith("_exps.weight"):
            weights[parameter] = functools.partial(
                _changed, names[0], first, weights[parameter], _transposed
            )
    _log_types(file, header)
    return GGUFModel(config, weights, header.bytes, is_quantized_gguf(header))


def _one(
    parameter: str, name: str, tensor: GGUFTensor, family: Family, config: dict[str, Any]
) -> Thunk:
    """Return the thunk of a parameter that is one tensor."""
    value_heads = ValueHeads.of(config)
    order: Order | None = None
    if family.interleaved and (match := re.search(r"\.attn_([qk])\.weight", name)):
        heads = config[f"num_{_HEADS[match[1]]}_heads"]
        order = functools.partial(_halves_together, heads=heads)
    elif value_heads is not None:
        order = value_heads.rows(name)
    minus = float(family.norms_plus_one and re.search(r"(?<!ssm_)norm\.weight$", name) is not None)
    shape: tuple[int, ...] | None = None
    if parameter.endswith("shared_expert_gate.weight"):
        shape = (1, -1)
    elif parameter.endswith((".conv1d.weight", ".conv.conv.weight")):
        shape = (tensor.shape[0], 1, tensor.shape[-1])
    read = functools.partial(_weight, name, tensor, order, minus, shape)
    if value_heads is None or not name.endswith((".ssm_a", ".ssm_out.weight")):
        return read
    change = _log if name.endswith("_a") else value_heads.columns
    return functools.partial(_changed, name, tensor, read, change)


def is_quantized_gguf(header: GGUFHeader) -> bool:
    """Whether a model has a tensor that is not in F32, F16 or BF16."""
    return any(tensor.type.unpack is not None for tensor in header.tensors.values())


def _parameter(file: Path, stored: str, family: Family, fields: dict[str, Any]) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", stored)
    names, part = (family.layer, match[2]) if match else (family.model, stored)
    part = re.sub(_EXPERT, ".*.", part)
    if part not in names:
        fail_checkpoint(
            f"{file}: tensor {stored!r}",
            f"a tensor of a {family.model_type} model as transformers has it",
            "an unknown one",
            instead(fields),
        )
    return f"model.layers.{match[1]}.{names[part]}" if match else names[part]


def _without_later_layers(header: GGUFHeader, name: str) -> GGUFHeader:
    """Return a header without layers of multi-token prediction, which transformers has none of."""
    blocks, later = (header.fields.get(f"{name}.{key}") for key in ("block_count", NEXTN))
    if not name.startswith("qwen35") or type(blocks) is not int or type(later) is not int:
        return header
    numbers = {stored: re.match(r"blk\.(\d+)\.", stored) for stored in header.tensors}
    tensors = {
        stored: tensor
        for stored, tensor in header.tensors.items()
        if (match := numbers[stored]) is None or int(match[1]) < blocks - later
    }
    return header._replace(tensors=tensors)


def _stays(name: str, tensor: GGUFTensor) -> bool:
    """Whether a tensor stays in 4 or 8 bits."""
    matrix = len(tensor.shape) == (3 if "_exps." in name else 2)
    is_read_as_one = name in _ENDS or _MATRIX.fullmatch(name) is not None
    return matrix and tensor.type.is_exact and is_read_as_one


def _log_types(file: Path, header: GGUFHeader) -> None:
    """Log the types that stay quantized and those that are expanded, with their memory."""
    count: Counter[tuple[str, str]] = Counter()
    stored: Counter[tuple[str, str]] = Counter()
    taken: Counter[tuple[str, str]] = Counter()
    for name, tensor in header.tensors.items():
        stays, values = _stays(name, tensor), tensor.bytes // tensor.type.bytes * tensor.type.values
        plain = tensor.type.unpack is None
        key = ("as stored" if plain else "in 4 or 8 bits" if stays else "as fp32", tensor.type.name)
        count[key] += 1
        stored[key] += tensor.bytes
        taken[key] += int(values * (tensor.type.bits if stays or plain else 32) / 8)
    lines = [
        f"{count[key]} × {key[1]} {key[0]} ({stored[key] / 1e6:,.0f} MB in the file, "
        f"{taken[key] / 1e6:,.0f} MB in memory)"
        for key in sorted(count)
    ]
    total = sum(taken.values())
    logger.info(
        "%s: %s; %s MB of weights in all", file.name, "; ".join(lines), f"{total / 1e6:,.0f}"
    )


def _without_data() -> bool:
    """Whether only shapes and types are read: within torch.device("meta")."""
    return torch.get_default_device().type == "meta"


def _chunks(name: str, tensor: GGUFTensor) -> Iterator[Tensor]:
    """Yield a tensor's blocks, uint8 [B, bytes of a block]; none within torch.device("meta")."""
    if _without_data():
        return
    kind, blocks = tensor.type, tensor.bytes // tensor.type.bytes
    step = max(1, _CHUNK // kind.values)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for start in range(0, blocks, step):
            size = min(step, blocks - start) * kind.bytes
            data = np.fromfile(stream, np.uint8, size)
            if data.size != size:
                fail("data", f"{tensor.bytes:,} bytes", f"{start * kind.bytes + data.size:,}")
            yield torch.from_numpy(data).view(-1, kind.bytes)


def _read(name: str, tensor: GGUFTensor) -> Tensor | QuantWeight:
    """Return a tensor; a matrix in its quantized form, if there is one."""
    if not _stays(name, tensor):
        return _dense(name, tensor)
    *rows, K = tensor.shape
    with reading(tensor.file, name):
        return quantized(tensor.type, (int(np.prod(rows)), K), _chunks(name, tensor))


def _dense(name: str, tensor: GGUFTensor) -> Tensor:
    """Return a tensor in full precision."""
    with reading(tensor.file, name):
        if tensor.type.unpack is not None:
            return expanded(tensor.type, tensor.shape, _chunks(name, tensor))
        if _without_data():
            return torch.empty(tensor.shape, dtype=tensor.type.dtype)
        data = np.fromfile(tensor.file, np.uint8, tensor.bytes, offset=tensor.start)
        if data.size != tensor.bytes:
            fail("data", f"{tensor.bytes:,} bytes", f"{data.size:,}")
        return torch.from_numpy(data).view(tensor.type.dtype).view(tensor.shape)


def _weight(
    name: str,
    tensor: GGUFTensor,
    order: Order | None,
    minus: float,
    shape: tuple[int, ...] | None,
) -> Tensor | QuantWeight | Expanded:
    """Return the parameter of one tensor, undoing what the converter changed."""
    weight = _read(name, tensor)
    with reading(tensor.file, name):
        if order is not None:
            rows = order(tensor.shape[0])
            weight = weight[rows] if isinstance(weight, Tensor) else take_rows(weight, rows)
        if isinstance(weight, Tensor):
            weight = weight.float() - minus if minus else weight
            weight = weight if shape is None else weight.view(shape)
            if _MATRIX.fullmatch(name) and tensor.type.unpack is not None:
                return Expanded(weight, f"GGUF {tensor.type.name}")
    return weight


def _halves_together(rows: int, heads: int) -> Tensor:  # inside `reading`
    """Return the order that takes rows (h, i, half) to (h, half, i)."""
    if heads < 1 or rows % (2 * heads):
        fail("data", f"{heads} heads of an even number of rows each", f"{rows} rows")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def _row(name: str, tensor: GGUFTensor, row: int) -> Tensor:
    """Return a row of a matrix in full precision."""
    values = _dense(name, tensor)
    with reading(tensor.file, name):
        if values.dim() != 2:
            fail("shape", "[heads, width of a head]", list(values.shape))
    return values[row]


def _changed(
    name: str, tensor: GGUFTensor, read: Thunk, change: Callable[[Any], Any]
) -> Tensor | QuantWeight | Expanded:
    """Return what `change` makes of a weight: of its values if it is expanded."""
    weight = read()
    with reading(tensor.file, name):
        if isinstance(weight, Expanded):
            return replace(weight, values=change(weight.values))
        changed: Tensor | QuantWeight = change(weight)
    return changed


def _transposed(weight: Tensor | QuantWeight) -> Tensor | QuantWeight:
    """Return experts [E, N, K] in full precision as [E, K, N]; quantized ones unchanged."""
    return weight.transpose(1, 2).contiguous() if isinstance(weight, Tensor) else weight


def _log(decay: Tensor) -> Tensor:
    """Return A_log of decay = −exp(A_log)."""
    return torch.log(-decay.float())


def _gate_up(
    file: Path, tensors: dict[str, GGUFTensor], alternating: bool
) -> Tensor | QuantWeight | Expanded:
    """Return the stack [E, 2 I, H] of gates [E, I, H] and ups [E, I, H], or [E, 2 I] of biases.

    alternating: rows of gates and ups alternate; otherwise the gates of an expert are first."""
    if any(re.search(_EXPERT, name) for name in tensors):
        return _stack(file, tensors, ("gate", "up"))
    names = sorted(tensors)  # ffn_gate_exps, ffn_up_exps
    if len(names) != 2 or tensors[names[0]].shape != tensors[names[1]].shape:
        got = ", ".join(f"{name} {list(tensors[name].shape)}" for name in names)
        fail_checkpoint(file, "ffn_gate_exps and ffn_up_exps of one shape in each layer", got)
    shape = tensors[names[0]].shape
    with reading(tensors[names[0]].file, names[0]):
        dims = ("experts", "rows", "columns")[: 2 if names[0].endswith(".bias") else 3]
        if len(shape) != len(dims):
            fail("shape", f"[{', '.join(dims)}]", list(shape))
    both = _below(tensors, names, 1)
    if isinstance(both, Expanded):
        return replace(both, values=_alternate(both.values)) if alternating else both
    if isinstance(both, Tensor):
        return _alternate(both) if alternating else both
    experts, rows, _ = shape
    order = torch.arange(2 * experts * rows).view(2, experts, rows)
    order = order.permute(1, 2, 0) if alternating else order.transpose(0, 1)
    return take_rows(both, order.reshape(-1))


def _alternate(values: Tensor) -> Tensor:
    """Return gates and then ups, [E, 2 I, …], as rows of both in turn."""
    experts, rows = values.shape[:2]
    split = values.view(experts, 2, rows // 2, *values.shape[2:])
    return split.transpose(1, 2).reshape(values.shape)


def _stack(
    file: Path, tensors: dict[str, GGUFTensor], parts: tuple[str, ...]
) -> Tensor | QuantWeight | Expanded:
    """Return the stack [E, N, K] of matrices of single experts; N is the sum over `parts`."""
    block = next(iter(tensors)).rpartition(".ffn_")[0]
    experts = len(tensors) // len(parts)
    names = [f"{block}.ffn_{part}.{e}.weight" for e in range(experts) for part in parts]
    shapes = {tensors[name].shape for name in names if name in tensors}
    if set(names) != set(tensors) or len(shapes) != 1 or len(min(shapes)) != 2:
        expected = f"{' and '.join(f'ffn_{part}.N.weight' for part in parts)} of each expert"
        got = f"{len(tensors)} tensors, {min(tensors)} {list(min(shapes))} among them"
        fail_checkpoint(f"{file}: {block}", f"{expected}, in one shape", got)
    stack = _below(tensors, names, 0)
    if isinstance(stack, Tensor):
        return stack.view(experts, -1, stack.shape[1])
    if isinstance(stack, Expanded):
        return replace(stack, values=stack.values.view(experts, -1, stack.values.shape[1]))
    return stack


def _below(
    tensors: dict[str, GGUFTensor], names: list[str], axis: int
) -> Tensor | QuantWeight | Expanded:
    """Return tensors of one shape stacked by rows; in full precision, concatenated at `axis`."""
    first = tensors[names[0]]
    if any(
        tensors[name].type is not first.type or not _stays(name, tensors[name]) for name in names
    ):
        values = torch.cat([_dense(name, tensors[name]) for name in names], axis)
        if all(tensors[name].type.unpack is None for name in names):
            return values
        kinds = dict.fromkeys(tensors[name].type.name for name in names)
        return Expanded(values, f"GGUF {' and '.join(kinds)}")
    weights: list[Any] = [_read(name, tensors[name]) for name in names]
    rows = sum(weight.shape[0] for weight in weights)
    joined: dict[str, Any] = {"shape": (rows, weights[0].shape[1])}
    for part in ("scale", "qdata", "offset"):
        if getattr(weights[0], part, None) is not None:
            joined[part] = torch.cat([getattr(weight, part) for weight in weights])
    stack: QuantWeight = replace(weights[0], **joined)
    return stack
