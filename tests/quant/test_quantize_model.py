"""quantize_model swaps the right layers, and what is left behaves as a module should."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import fastdistill as fd
from fastdistill.quant import Int8Linear, LUT4Linear
from fastdistill.quant.experts import Expert, ExpertStack
from fastdistill.quant.fake import WEIGHT_SCHEMES
from fastdistill.quant.linear import QuantizedWeight
from helpers.quant_models import CONFIGS, SIZES, logits, model_of


@torch.no_grad()
def densely(model: nn.Module, quantised: nn.Module) -> nn.Module:
    """The model with the weights that the quantised one stands for."""
    dense = copy.deepcopy(model)
    for name, module in quantised.named_modules():
        if not isinstance(module, QuantizedWeight):
            continue
        weight = module.dequantize()
        if isinstance(module, ExpertStack):
            stack = dense.get_parameter(name)
            stack.copy_(weight.view(stack.shape))
        else:
            target: Any = dense.get_submodule(name)
            target.weight.copy_(weight.t() if hasattr(target, "nf") else weight)  # Conv1D
    return dense


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_exact_compute_is_the_model_with_rounded_weights(name, scheme):
    model = model_of(name)
    quantised = fd.quantize_model(copy.deepcopy(model), scheme, compute="exact")
    assert torch.allclose(logits(quantised), logits(densely(model, quantised)), atol=2e-5)
    assert not torch.equal(logits(quantised), logits(model))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_int8_compute_is_near_the_exact_one(name, scheme):
    model = model_of(name)
    exact = logits(fd.quantize_model(copy.deepcopy(model), scheme, compute="exact"))
    fast = logits(fd.quantize_model(copy.deepcopy(model), scheme, compute="int8"))
    assert (fast - exact).norm() / exact.norm() < 0.04


def test_what_is_swapped_and_what_is_not():
    model: Any = fd.quantize_model(model_of("mixtral"), "nf4")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] is LUT4Linear
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] is ExpertStack
    assert kinds["lm_head"] is nn.Linear
    assert kinds["model.embed_tokens"] is nn.Embedding
    assert not issubclass(kinds["model.layers.0.mlp.gate"], QuantizedWeight)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    partial: Any = fd.quantize_model(
        model_of("llama"), "int8", skip=("model.layers.0", "o_proj", "lm_head")
    )
    assert isinstance(partial.model.layers[0].self_attn.q_proj, nn.Linear)
    assert isinstance(partial.model.layers[1].self_attn.o_proj, nn.Linear)
    assert isinstance(partial.model.layers[1].self_attn.q_proj, Int8Linear)


def test_a_tied_head_stays_although_nobody_named_it():
    model: Any = fd.quantize_model(model_of("gpt2"), "nf4", skip=())
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.transformer.h[0].attn.c_attn, LUT4Linear)
    assert model.transformer.h[0].attn.c_attn.out_features == 192


def test_state_dict_is_the_same_before_and_after_a_forward_pass_and_loads_back():
    for name, scheme in (("llama", "nf4"), ("mixtral", "int8"), ("gpt2", "int4")):
        model: Any = fd.quantize_model(model_of(name), scheme, compute="int8")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        expected = logits(model)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        other = fd.quantize_model(model_of(name).apply(_noise), scheme, compute="int8")
        other.load_state_dict(before)
        assert torch.equal(logits(other), expected)


def test_row_steps_follow_the_weights_that_are_loaded():
    layers = [LUT4Linear.from_linear(nn.Linear(64, 32), compute="int8") for _ in "ab"]
    first, second = cast(Any, layers)
    second.load_state_dict(first.state_dict())
    assert "row_scale" not in first.state_dict()
    assert torch.equal(second.row_scale, first.row_scale)
    top = first.dequantize().abs().amax(-1)
    assert torch.equal(first.row_scale, top / 127)


def _noise(module: nn.Module) -> None:
    for p in module.parameters(recurse=False):
        p.data.normal_(0, 0.1)


def test_changing_the_type_leaves_scales_alone():
    model: Any = fd.quantize_model(model_of("llama with biases"), "nf4", compute="exact")
    layer = model.model.layers[0].self_attn.q_proj
    scale = layer.scale.clone()
    model.bfloat16()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, scale)
    assert layer.bias.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    model.double()
    assert logits(model).dtype == torch.float64


def test_forward_only():
    layer = LUT4Linear.from_linear(nn.Linear(64, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"x: a quantized layer is forward only.*no_grad"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (2, 64)


def test_experts_answer_to_linear_alone():
    model: Any = fd.quantize_model(model_of("mixtral"), "nf4", compute="exact")
    stack = model.model.layers[0].mlp.experts.down_proj
    assert len(stack) == 4
    x = torch.randn(3, 128)
    dense = stack.dequantize().view(4, 64, 128)[2]
    actual = nn.functional.linear(x, stack[torch.tensor(2)])
    assert torch.allclose(actual, x @ dense.t(), atol=1e-6)
    assert isinstance(stack[1], Expert)
    with pytest.raises(TypeError, match=r"quantized experts: expected .*linear"):
        torch.matmul(x, stack[0])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: fd.quantize_model(m, "nf3"), "scheme: expected one of .*'nf3'"),
        (
            lambda m: fd.quantize_model(m, "nf4", compute="int4"),
            "compute: expected one of .*'int4'",
        ),
        (
            lambda m: fd.quantize_model(nn.ReLU(), "nf4"),
            "model: expected linear layers to quantize",
        ),
        (
            lambda m: fd.quantize_model(m, "nf4", compute="fp8"),
            "'fp8' cannot run on model.layers.0.self_attn.q_proj: it needs a GPU",
        ),
        (
            lambda m: fd.quantize_model(nn.Sequential(nn.Linear(50, 3)), "nf4", compute="int8"),
            "'int8' cannot run on 0: blocks of 64 cross its rows of 50",
        ),
        (lambda m: LUT4Linear.from_linear(nn.Linear(8, 8), "int8"), "8 bits are an Int8Linear"),
    ],
)
def test_errors(call, error):
    with pytest.raises(ValueError, match=error):
        call(model_of("llama"))


def test_experts_that_share_a_block_are_named():
    sizes = SIZES | dict(hidden_size=48)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes | dict(intermediate_size=9), num_local_experts=4)
    )
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: weight: expected 4 experts of"):
        fd.quantize_model(model, "nf4")


def test_weights_that_are_not_finite_are_named():
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: weight: expected finite"):
        fd.quantize_model(model, "nf4")


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_compiles_into_one_graph(compute):
    layer = LUT4Linear.from_linear(nn.Linear(128, 64), compute=compute)
    block = nn.Sequential(layer, nn.GELU())
    x = torch.randn(5, 128)
    with torch.no_grad():
        actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(actual, block(x))


def test_operators_pass_opcheck():
    four, eight = (kind.from_linear(nn.Linear(128, 64)) for kind in (LUT4Linear, Int8Linear))
    w: Any = four.quantized
    e: Any = eight.quantized
    x = torch.randn(5, 128)
    calls_of: dict[str, list[tuple[Any, ...]]] = {
        "lut4_dequant": [(w.qdata, w.scale, [], 0, None, w.lut, 64, 128, 64, torch.bfloat16)],
        "int8_dequant": [(e.qdata, e.scale, 128, torch.float16)],
        "quantize_rows": [(x, torch.int8), (x, torch.float8_e4m3fn)],
        "row_topk": [(torch.randn(3, 50), 4)],
        "lut4_linear": [
            (x, w.qdata, w.scale, [], 0, None, w.lut, None, four.bias, 64, 64, compute)
            for compute in ("exact", "int8")
        ],
        "int8_linear": [
            (x, e.qdata, e.scale, None, None, 128, compute) for compute in ("exact", "int8")
        ],
    }
    for name, calls in calls_of.items():
        for arguments in calls:
            torch.library.opcheck(
                getattr(torch.ops.fastdistill, name).default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )
