"""What tests/test_gpu.py runs of quantised inference: every implementation against plain PyTorch on
the same device, bit for bit, and every compute against fp64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fastdistill.quant import Int8Linear, LUT4Linear
from fastdistill.quant.backends.table import CUDA, TORCH, QuantEngine, triton
from fastdistill.quant.backends.torch_ops import FP8, TOP
from fastdistill.quant.schemes import Lut4Weight, quantize
from fastdistill.runtime import backend
from helpers.gpu_checks import DEVICE
from helpers.quant_engines import flat_reference, random_lut4

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [((3, 50), 64), ((5, 33), 32), ((9, 1024), 1024), ((4, 96), 48), ((64, 4096), 64)]


def engines() -> list[QuantEngine]:
    here = [triton()]
    if DEVICE == "cuda" and backend.cuda_extension() is not None:
        here.append(CUDA)
    return here


def expanded_weights_have_the_same_bits():
    for engine in engines():
        for shape, block in SHAPES:
            for options in ({}, {"offset": True}, {"nested": True}):
                w = random_lut4(shape, block, device=DEVICE, **options)
                top = flat(w, torch.float32).abs().amax(-1)
                for dtype in (*FLOATS, torch.int8, FP8):
                    inverse = None if dtype in FLOATS else TOP[dtype] / top
                    actual, truth = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in "ab")
                    engine.lut4_dequant(w, actual, inverse)
                    TORCH.lut4_dequant(w, truth, inverse)
                    what = f"{engine.name} {shape} {block} {options} {dtype}"
                    assert torch.equal(actual.view(torch.uint8), truth.view(torch.uint8)), what
                    if dtype in FLOATS:
                        assert torch.equal(actual, flat(w, dtype)), what


def flat(w: Lut4Weight, dtype: torch.dtype) -> torch.Tensor:
    """By the definition, on the CPU."""
    there = replace(
        w,
        qdata=w.qdata.cpu(),
        scale=w.scales.cpu(),
        lut=w.lut.cpu(),
        offset=None if w.offset is None else w.offset.cpu(),
    )
    return flat_reference(there, dtype).to(w.qdata.device)


def more_than_two_to_the_31_weights():
    """Index arithmetic past 2³¹; on a CPU's interpreter a small one stands in."""
    shape = (1 << 19, 1 << 12) if DEVICE == "cuda" else (64, 128)
    shape = (shape[0] + 3, shape[1])
    for engine in engines():
        w = random_lut4(shape, device=DEVICE)
        out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        engine.lut4_dequant(w, out)
        last, start = out[-3:], (shape[0] - 3) * shape[1]
        assert isinstance(w.scale, torch.Tensor)
        qdata, scale = w.qdata[start // 2 :], w.scale[start // 64 :]
        end = replace(w, shape=(3, shape[1]), qdata=qdata, scale=scale)
        assert torch.equal(last, flat(end, torch.bfloat16)), engine.name


def rows_are_rounded_alike():
    for engine in engines():
        for dtype in FLOATS:
            x = (torch.randn(37, 1000, device=DEVICE) * 3).to(dtype)
            x[1] = 0
            x[2, 3], x[3, 4], x[4, 5] = torch.nan, torch.inf, 60000
            for kind in (torch.int8, FP8):
                actual, truth = engine.quantize_rows(x, kind), TORCH.quantize_rows(x, kind)
                what = f"{engine.name} {dtype} {kind}"
                assert torch.equal(actual[1].nan_to_num(-1), truth[1].nan_to_num(-1)), what
                assert torch.equal(actual[0].view(torch.uint8), truth[0].view(torch.uint8)), what


def every_compute_against_fp64():
    computes = {"exact": 0.004, "int8": 0.02}
    if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        computes["fp8"] = 0.06
    for tokens in (1, 17, 300):
        linear = nn.Linear(1024, 512, device=DEVICE)
        x = torch.randn(tokens, 1024, device=DEVICE)
        for compute, budget in computes.items():
            for dtype in FLOATS:
                for layer in (
                    LUT4Linear.from_linear(linear, "nf4", compute=compute),
                    Int8Linear.from_linear(linear, compute=compute),
                ):
                    inputs = x.to(dtype)
                    with torch.no_grad():
                        actual = layer(inputs).double()
                    truth = inputs.double() @ layer.dequantize().double().t() + linear.bias.double()
                    error = ((actual - truth).norm() / truth.norm()).item()
                    assert error < budget, f"{type(layer)} {compute} {dtype} {tokens}: {error}"


def quantising_on_the_device_gives_the_same_bytes():
    weight = torch.randn(128, 320)
    for scheme in ("nf4", "fp4", "int4", "int8"):
        here, there = quantize(weight, scheme), quantize(weight.to(DEVICE), scheme)
        assert torch.equal(here.qdata, there.qdata.cpu()), scheme
        assert isinstance(here.scale, torch.Tensor)
        assert isinstance(there.scale, torch.Tensor)
        assert torch.equal(here.scale, there.scale.cpu()), scheme


CHECKS = [
    expanded_weights_have_the_same_bits,
    more_than_two_to_the_31_weights,
    rows_are_rounded_alike,
    every_compute_against_fp64,
    quantising_on_the_device_gives_the_same_bytes,
]
