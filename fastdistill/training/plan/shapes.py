"""Counts a model's parameters from its config.json, on the meta device.

Parts: body, input embedding, output head (0 if tied), and sizes after quantization.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ...hf.checkpoint import config_folder
from ...hf.lm_head import head_module
from ...quant.experts import ExpertStack
from ...quant.formats.checkpoint_gate import load_config
from ...quant.formats.tensor_files import CheckpointError
from ...quant.linear import QuantizedWeight
from ...quant.model import stacks, targets
from ...quant.schemes import BLOCK, Int8Weight, Lut4Weight, QuantWeight
from ...runtime import checks
from ...runtime.printable import printable


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Parameters of a causal language model, by part."""

    name: str
    model_type: str
    layers: int
    body: int
    embeddings: int
    head: int  # 0 if tied to the embedding
    tied: bool

    @property
    def total(self) -> int:
        return self.body + self.embeddings + self.head


def config_of(role: str, source: str | Path) -> Any:
    """Return the configuration in a folder, a config.json or a .gguf file, or on the hub.

    For an adapter, it is the configuration of its base. Only config.json is downloaded, and no
    remote code is run.

    Raises:
        FileNotFoundError: nothing is there. ValueError: there is no configuration, or transformers
        does not know the model.
    """
    cached = "pass the model that gave the answers, with cached=true"
    hint = cached if role == "teacher" else ""
    path = config_folder(role, source, hint)
    try:
        return load_config(path)[0]
    except CheckpointError as error:
        expected = f"a configuration that transformers reads in {printable(source)}"
        checks.fail(role, expected, printable(error, 1000))


def empty_model(role: str, config: Any, dtype: torch.dtype) -> Any:
    """Return the model on the meta device, with shapes and types but without memory.

    Raises:
        ValueError: transformers cannot build a causal language model from the configuration.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{role}: expected the configuration of a causal language model, got model_type="
            f"{getattr(config, 'model_type', None)!r}: {first}"
        ) from None
    model.tie_weights()
    return model


def shapes_of(name: str, model: Any) -> Shapes:
    """Return the number of parameters of a model, by part."""
    embedding = model.get_input_embeddings().weight
    head: Any = head_module(model).weight
    tied = head is embedding
    total = sum(p.numel() for p in model.parameters())
    untied_head = 0 if tied else head.numel()
    config = model.config.get_text_config()
    return Shapes(
        name=name,
        model_type=config.model_type,
        layers=int(getattr(config, "num_hidden_layers", 0)),
        body=total - embedding.numel() - untied_head,
        embeddings=embedding.numel(),
        head=untied_head,
        tied=tied,
    )


def bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers; counts shared tensors once."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True, kw_only=True)
class QuantizedSize:
    """Bytes of a quantized model, and of its largest layer when expanded for its product."""

    weights: int
    expanded: int


def quantized_size(model: nn.Module, scheme: str) -> QuantizedSize:
    """Return the size of a model after quantize_model, without changing the model.

    Raises:
        ValueError: a model without layers to quantize.
    """
    dense: list[Any] = [module.weight for _, module in targets(model)]
    dense += [getattr(module, parameter) for _, module, parameter in stacks(model)]
    if not dense:
        raise ValueError(
            f"teacher: expected linear layers to quantize, got none in {type(model).__name__}"
        )
    saved = sum(w.nbytes - stored_bytes(w, scheme) for w in dense)
    largest = max(w.nbytes // (w.shape[0] if w.dim() == 3 else 1) for w in dense)
    return QuantizedSize(weights=bytes_of(model) - saved, expanded=largest)


def packed_size(model: nn.Module) -> QuantizedSize:
    """Return the size of a model of load_shapes."""
    sizes = [
        math.prod(layer.shape) // (layer.experts if isinstance(layer, ExpertStack) else 1)
        for layer in model.modules()
        if isinstance(layer, QuantizedWeight)
    ]
    itemsize = next(model.parameters()).element_size()
    return QuantizedSize(weights=bytes_of(model), expanded=max(sizes, default=0) * itemsize)


def stored_bytes(weight: Tensor, scheme: str) -> int:
    """Return the bytes of a weight in a scheme; the format checks the sizes of its parts."""
    N, K = math.prod(weight.shape[:-1]), weight.shape[-1]
    quantized: QuantWeight

    def part(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    if scheme == "int8":
        qdata, scale = part(N * K, torch.int8), part(N, torch.float32)
        quantized = Int8Weight(shape=(N, K), block=K, qdata=qdata, scale=scale)
    else:
        blocks = -(-N * K // BLOCK)
        quantized = Lut4Weight(
            shape=(N, K),
            block=BLOCK,
            qdata=part(-(-N * K // 2), torch.uint8),
            scale=part(blocks, torch.float32),
            lut=part(16, torch.float32),
            offset=part(blocks, torch.float32) if scheme == "int4" else None,
        )
    return sum(p.nbytes for p in vars(quantized).values() if isinstance(p, Tensor))
