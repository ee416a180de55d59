"""Quantised layers and their operators, the same bits from every implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastdistill.quant import Int8Linear, LUT4Linear, ops
from fastdistill.quant.backends.table import TORCH
from fastdistill.quant.backends.torch_ops import FP8
from fastdistill.quant.linear import dequantize
from fastdistill.quant.schemes import int8_table
from helpers.present import present
from helpers.quant_engines import NAMES, flat_reference, random_lut4, use

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PRODUCTS = [name for name in NAMES if name != "triton"]  # Triton expands and rounds, on GPUs
OPS = torch.ops.fastdistill


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((32, 128), 64), ((3, 50), 64), ((5, 33), 32), ((7, 1), 64), ((9, 1024), 1024), ((4, 96), 48)],
)
def test_dequantised_bits(name, dtype, shape, block, monkeypatch):
    use(monkeypatch, name)
    for offset in (False, True):
        weight = random_lut4(shape, block, offset=offset)
        assert isinstance(weight.scale, torch.Tensor)
        weight.scale[0] = 0
        assert torch.equal(dequantize(weight, dtype), flat_reference(weight, dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter, 0 · inf
@pytest.mark.parametrize("name", NAMES)
def test_nested_scales_and_values_that_are_not_finite(name, monkeypatch):
    use(monkeypatch, name)
    weight, plain = random_lut4((24, 1024), nested=True), random_lut4((24, 1024))
    for dtype in FLOATS:
        assert torch.equal(dequantize(weight, dtype), flat_reference(weight, dtype))
    assert isinstance(plain.scale, torch.Tensor)
    plain.scale[1], plain.scale[3] = torch.nan, torch.inf
    actual, expected = dequantize(plain), flat_reference(plain, torch.float32)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_rows_rounded_to_eight_bits(name, kind, monkeypatch):
    engine = use(monkeypatch, name)
    for dtype in FLOATS:
        x = (torch.randn(9, 160) * 3).to(dtype)
        x[1] = 0
        x[2, 3], x[3, 4] = torch.nan, torch.inf
        x[4, 0] = 100
        q, scale = engine.quantize_rows(x, kind)
        back = q.float() * scale[:, None]
        assert torch.equal(scale.isnan().nonzero().view(-1), torch.tensor([2, 3]))
        assert not back[1].any()
        fine = [0, 1, 4, 5, 6, 7, 8]
        top = x[fine].float().abs().amax(-1, keepdim=True)
        step = top / 254 if kind == torch.int8 else x[fine].float().abs() / 16 + top / 448 / 1024
        assert ((back[fine] - x[fine].float()).abs() <= step * 1.001).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_rounded_to_eight_bits_per_row(name, monkeypatch):
    engine = use(monkeypatch, name)
    weight = random_lut4((16, 128))
    dense = flat_reference(weight, torch.float32)
    for kind, top in ((torch.int8, 127), (FP8, 448)):
        inverse = top / dense.abs().amax(-1)
        out = torch.empty(16, 128, dtype=kind)
        engine.lut4_dequant(weight, out, inverse)
        steps = dense * inverse[:, None]
        assert torch.equal(
            out.float(), steps.round() if kind == torch.int8 else steps.to(kind).float()
        )


def reference_products(x, dense, group):
    """fp64 products of the activations as `group` columns round them."""
    groups = x.double().view(len(x), -1, group)
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups / step.clamp(min=1e-300)).round() * step
    return rounded.view(x.shape) @ dense.double().t()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("M", "N", "K", "block"),
    [(1, 64, 256, 64), (17, 33, 128, 32), (5, 31, 192, 128), (3, 1, 64, 64)],
)
def test_int8_products_of_4_bit_weights(name, offset, M, N, K, block, monkeypatch):
    use(monkeypatch, name)
    x, bias = torch.randn(M, K), torch.randn(N)
    x[:, 5] *= 100  # an outlier channel
    weight = random_lut4((N, K), block, offset=offset)
    layer = LUT4Linear(weight, bias, compute="int8")
    weight_group, group = present(ops.groups(K, block))
    codes, unit = int8_table(weight.lut)
    dense = flat_reference(replace(weight, lut=codes.float() * unit), torch.float32)
    expected = reference_products(x, dense, group) + bias
    actual = layer(x).double()
    assert (actual - expected).norm() / expected.norm() < 2e-6
    use(monkeypatch, "torch")
    for dtype in FLOATS:
        ours = LUT4Linear(weight, bias, compute="int8")(x.to(dtype))
        use(monkeypatch, name)
        assert torch.equal(layer(x.to(dtype)), ours)
        use(monkeypatch, "torch")
    assert weight_group % group == 0


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_products_of_8_bit_weights(name, monkeypatch):
    x, linear = torch.randn(13, 256), nn.Linear(256, 70)
    expected = use(monkeypatch, "torch") and Int8Linear.from_linear(linear, compute="int8")(x)
    use(monkeypatch, name)
    layer = Int8Linear.from_linear(linear, compute="int8")
    assert torch.equal(layer(x), expected)
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < 0.012
    one_by_one = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(one_by_one, layer(x))  # a token's result does not depend on its batch


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(2, 3, 128), (128,), (0, 128)])
def test_layers(compute, scheme, shape):
    linear = nn.Linear(128, 48)
    make = Int8Linear.from_linear if scheme == "int8" else LUT4Linear.from_linear
    options = {} if scheme == "int8" else {"scheme": scheme}
    layer = make(linear, compute=compute, **options)
    x = torch.randn(shape)
    with torch.no_grad():
        actual = layer(x)
        expected = nn.functional.linear(x, layer.dequantize(), linear.bias)
    assert actual.shape == expected.shape
    budget = 1e-6 if compute == "exact" else 0.02
    assert (actual - expected).norm() <= budget * expected.norm()
    assert f"compute='{compute}'" in repr(layer)


def test_perm_takes_columns_in_stored_order():
    weight = random_lut4((8, 64))
    perm = torch.randperm(64)
    permuted = replace(weight, perm=perm)
    x = torch.randn(3, 64)
    dense = dequantize(permuted)
    assert torch.equal(dense[:, perm], dequantize(weight))
    assert torch.allclose(LUT4Linear(permuted, compute="exact")(x), x @ dense.t(), atol=1e-5)


def test_row_products_of_a_gpu_against_fp64():
    """What a GPU computes in fp8 and int8, with PyTorch's own 8-bit products on this CPU."""
    x, w = torch.randn(20, 128), torch.randn(32, 128)
    bias = torch.randn(32)
    expected = x.double() @ w.double().t() + bias
    for kind, budget in ((torch.int8, 0.02), (FP8, 0.05)):
        q, scale = TORCH.quantize_rows(w, kind)
        actual = ops.row_products(TORCH, x, q, scale, bias)
        assert (actual - expected).norm() / expected.norm() < budget
        few = ops.row_products(TORCH, x[:3], q, scale, bias)
        assert torch.equal(few, actual[:3])
