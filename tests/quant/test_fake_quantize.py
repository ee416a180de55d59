"""Fake quantization: NVFP4, the straight-through gradient, and exports with the same bits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fastdistill as fd
from fastdistill.quant import fake_quantize
from fastdistill.quant.fake import FakeQuantizedLinear
from fastdistill.quant.linear import QuantizedWeight, dequantize
from fastdistill.quant.loading import load_quantized
from fastdistill.quant.nvfp4 import quantize_nvfp4
from fastdistill.quant.schemes import unpack_nibbles
from helpers.quant_models import logits, model_of
from helpers.training import build, llama

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SCHEMES = ("nvfp4", "int4", "int8")


def weight_with_edges():
    torch.manual_seed(0)
    weight = torch.randn(6, 48) * torch.tensor([1.0, 1e-3, 3.0]).repeat_interleave(16)
    weight[0, :16] = torch.tensor(6.0)  # so that the global scale is 448 and this block's is 1
    weight[0, 1:9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])  # ties
    weight[0, 16:32] = 0.0
    weight[1, 16:32] = 1e-9  # a scale that e4m3 rounds to 0
    return weight.clamp(-6, 6)


def test_nvfp4_is_the_nearest_value_of_its_scale():
    weight = weight_with_edges()
    quantized = quantize_nvfp4(weight)
    scale = (weight.view(-1, 16).abs().amax(-1) / 6 * 448).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, 0.125, scale) / 448
    assert torch.equal(quantized.scales * 2, scale)
    codes = unpack_nibbles(quantized.qdata, weight.numel()).view(-1, 16)
    for block, s, row in zip(weight.view(-1, 16).double(), scale.double(), codes, strict=True):
        for value, code in zip(block.tolist(), row.tolist(), strict=True):
            distances = [abs(abs(value) / s.item() - e) for e in E2M1]
            nearest = [i for i, d in enumerate(distances) if d == min(distances)]
            expected = min(nearest, key=lambda i: i % 2)  # a tie goes to the even code
            assert code % 8 == expected
            assert (code >= 8) == (value < 0 and expected > 0)
    dense = dequantize(quantized)
    assert torch.equal(dense[0, :9], torch.tensor([6, 0, 1, 1, 2, 2, 4, 4, -4.0]))
    assert torch.equal(dense[1, 16:32], torch.zeros(16))


@pytest.mark.peers
def test_nvfp4_has_the_bits_of_compressed_tensors():
    package = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = package.preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    weight = weight_with_edges()
    low, high = weight.view(6, -1, 16).amin(-1), weight.view(6, -1, 16).amax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = helpers.generate_gparam(weight.amin(), weight.amax())
        scale, zero = helpers.calculate_qparams(low, high, args, whole)
        theirs = forward.fake_quantize(weight.clone(), scale, zero, args, global_scale=whole)
    assert torch.equal(dequantize(quantize_nvfp4(weight)), theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_that_of_the_rounded_weights_and_the_export_has_their_bits(tmp_path, scheme):
    model: Any = model_of("llama")
    student: Any = fake_quantize(copy.deepcopy(model), scheme)
    rounded: Any = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in student.named_modules():
            if isinstance(layer, FakeQuantizedLinear):
                weight = rounded.get_submodule(name).weight
                assert not torch.equal(weight, layer.quantized_weight())
                weight.copy_(layer.quantized_weight())
    assert torch.equal(logits(student), logits(rounded))
    ids = torch.arange(12)[None]
    for each in (student, rounded):
        each.requires_grad_(True)
        each(input_ids=ids, labels=ids).loss.backward()
    for p, q in zip(student.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)

    fd.save_quantized(fd.quantize_model(student, scheme, compute="exact"), tmp_path / "out")
    loaded: Any = load_quantized(tmp_path / "out", compute="exact")
    layers = 0
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantizedWeight):
            assert torch.equal(layer.dequantize(), rounded.get_submodule(name).weight)
            layers += 1
    assert layers == 14
    torch.testing.assert_close(logits(loaded), logits(rounded))


def test_the_trainer_distills_and_checkpoints_it_as_a_plain_model(tmp_path):
    teacher = llama(0, hidden=64)
    student = fake_quantize(copy.deepcopy(teacher), "nvfp4")
    trainer = build(
        tmp_path, model=student, teacher=teacher, k=None, max_steps=1, save_strategy="steps"
    )
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = saved.get_parameter(name)
    assert torch.equal(weight, student.get_parameter(name))
    assert not torch.equal(weight, teacher.get_parameter(name))
    assert not torch.equal(weight, dequantize(quantize_nvfp4(weight)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"scheme: expected one of 'nvfp4', .* got 'fp8'"):
        fake_quantize(model_of("llama"), "fp8")
    for name in ("gpt2", "mixtral"):
        with pytest.raises(ValueError, match=r"model: expected nn.Linear layers alone"):
            fake_quantize(model_of(name), "int4")
    with pytest.raises(ValueError, match=r"0: weight: expected .* K a multiple of 16"):
        fake_quantize(nn.Sequential(nn.Linear(24, 4)), "nvfp4")
    with pytest.raises(ValueError, match="model: expected linear layers to quantize, got none"):
        fake_quantize(nn.Sequential(nn.Linear(32, 4)), "nvfp4", skip="0")
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN"):
        quantize_nvfp4(torch.full((1, 16), torch.nan))
    student = fake_quantize(model_of("llama"), "int4", skip=("lm_head", "o_proj"))
    with pytest.raises(ValueError, match="model: expected layers in full precision, got layers"):
        fake_quantize(student, "int4")
    with pytest.raises(ValueError, match=r"scheme: expected 'int4', for which .* got 'nf4'"):
        fd.quantize_model(student, "nf4")
    with pytest.raises(ValueError, match=r"skip: expected the layers .* includes .*o_proj.weight"):
        fd.quantize_model(student, "int4")
    fd.quantize_model(student, "int4", skip=("lm_head", "o_proj"))
