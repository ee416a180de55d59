"""Published models with random weights: the cost of a step depends on shapes, not on values.

Each layer is created on the device and optionally quantized before the next one: the peak is the
quantized size. The same seed gives the same weights with any quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config

from fastdistill.quant.linear import linear_of
from fastdistill.quant.model import targets
from fastdistill.quant.schemes import quantize

from .data import device
from .shapes import Shape

Replace = Callable[[Tensor], nn.Module]

# From their config.json.
_QWEN3 = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=False,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        **_QWEN3,
    ),
    "qwen3-32b": lambda: Qwen3Config(
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        **_QWEN3,
    ),
}


def narrow(config: Any, shape: Shape) -> Any:
    """A small model of the same kind."""
    config.hidden_size, config.vocab_size, config.intermediate_size = shape.H, shape.V, 2 * shape.H
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 1
    config.head_dim, config.layer_types = shape.H // 2, None
    return type(config)(**config.to_dict())


@torch.no_grad()
def build(
    config: Any, replace: Replace | None = None, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Any:
    """The model on the device in bf16; `replace` maps its linear layers except the head."""
    dtype = torch.bfloat16 if dtype is None else dtype
    with init_empty_weights():  # buffers, such as the rotary frequencies, have real values
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    linears = dict(targets(model))
    draws = torch.Generator(device()).manual_seed(seed)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            values = torch.ones(parameter.shape, dtype=dtype, device=device())
            if values.dim() > 1:
                values.normal_(0.0, 0.02, generator=draws)
            setattr(module, leaf, nn.Parameter(values))
        if replace is not None and name in linears:
            model.set_submodule(name, replace(module.weight.detach()))
    model.tie_weights()
    return model.to(device()).eval()


def ours(scheme: str, compute: str) -> Replace:
    return lambda weight: linear_of(quantize(weight, scheme), None, compute)


def small_llama(shape: Shape, layers: int, longest: int, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and 8 heads of attention, in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.H,
        intermediate_size=11 * shape.H // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device())
