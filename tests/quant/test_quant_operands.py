"""Operands of a wrong length, type or shape are refused before a kernel reads from an address."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fastdistill.quant import Int8Linear, LUT4Linear
from fastdistill.quant.schemes import quantize

N, K, BLOCK = 8, 64, 16
KINDS = {"nf4": LUT4Linear, "int8": Int8Linear}
COMPUTES = ("int8", "exact")
OPS = torch.ops.fastdistill


def lut4_operands(**changed):
    w: Any = quantize(torch.randn(N, K), "nf4", block=BLOCK)
    operands: dict[str, Any] = {
        "x": torch.randn(2, K),
        "qdata": w.qdata,
        "scale": w.scale,
        "nested": [],
        "nested_block": 0,
        "offset": None,
        "lut": w.lut,
        "row_scale": None,
        "bias": torch.randn(N),
        "rows": N,
        "block": BLOCK,
        "compute": "exact",
    }
    return list((operands | changed).values())


def int8_operands(**changed):
    w = quantize(torch.randn(N, K), "int8")
    operands: dict[str, Any] = {"x": torch.randn(2, K), "qdata": w.qdata, "scale": w.scale}
    operands |= {"row_scale": None, "bias": torch.randn(N), "block": K, "compute": "exact"}
    return list((operands | changed).values())


def case_id(value):
    """A name of a case without its random numbers: test processes have to agree on it."""
    if not isinstance(value, dict):
        return str(value)
    return " ".join(
        f"{name} {v.dtype}{list(v.shape)}" if isinstance(v, torch.Tensor) else f"{name} {v}"
        for name, v in value.items()
    )


BAD_BIAS = [
    torch.zeros(1),
    torch.zeros(3),
    torch.zeros(N, 1),
    torch.zeros(1, N),
    torch.zeros(100),
    torch.zeros(()),
    torch.zeros(N, dtype=torch.int64),
]


@pytest.mark.parametrize("bias", BAD_BIAS, ids=lambda b: f"{list(b.shape)}-{b.dtype}")
@pytest.mark.parametrize("scheme", KINDS)
def test_layers_refuse_a_bias_of_another_shape(scheme, bias):
    weight = quantize(torch.randn(N, K), scheme, block=BLOCK)
    for compute in ("auto", *COMPUTES):
        with pytest.raises(ValueError, match=r"bias: expected .*\[8\], one number .*, got \["):
            KINDS[scheme](weight, bias, compute=compute)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("scheme", KINDS)
def test_layers_refuse_a_replaced_buffer(scheme, compute):
    names = {"nf4": ("qdata", "scale", "lut", "bias"), "int8": ("scale", "bias")}[scheme]
    for name in names:
        for change in (lambda t: t[: len(t) // 2], lambda t: torch.cat([t, t]), lambda t: t.half()):
            weight = quantize(torch.randn(N, K), scheme, block=BLOCK)
            layer = KINDS[scheme](weight, torch.randn(N), compute=compute)
            held = getattr(layer, name).flatten()
            if name == "bias" and change(held).dtype == torch.float16:
                continue  # a bias may have any floating-point type
            setattr(layer, name, change(held))
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                layer(torch.randn(2, K))


BAD_LUT4 = [
    ("bias", {"bias": torch.zeros(3)}),
    ("bias", {"bias": torch.zeros(N, 1)}),
    ("qdata", {"qdata": torch.zeros(7, dtype=torch.uint8)}),
    ("qdata", {"qdata": torch.zeros(N * K // 2)}),
    ("scale", {"scale": torch.ones(N * K // BLOCK, dtype=torch.float16)}),
    ("scale", {"scale": torch.ones(3)}),
    ("lut", {"lut": torch.zeros(4)}),
    ("lut", {"lut": torch.zeros(16, dtype=torch.float16)}),
    ("offset", {"offset": torch.zeros(2)}),
    ("row_scale", {"row_scale": torch.ones(3)}),
    ("block", {"block": 0}),
    ("qdata", {"rows": 2 * N}),
    ("qdata", {"x": torch.randn(2, 2 * K)}),
    ("x", {"x": torch.randn(K)}),
    ("x", {"x": torch.ones(2, K, dtype=torch.int64)}),
    ("nested", {"nested": [torch.ones(256)], "nested_block": 4}),
    ("scale", {"nested": [torch.ones(256), torch.ones(8), torch.ones(())], "nested_block": 4}),
]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("name", "changed"), BAD_LUT4, ids=case_id)
def test_lut4_linear_refuses(name, changed, compute):
    with pytest.raises(ValueError, match=f"^{name}[a-z ]*: expected"):
        OPS.lut4_linear(*lut4_operands(**(changed | {"compute": compute})))


BAD_INT8 = [
    ("bias", {"bias": torch.zeros(3)}),
    ("bias", {"bias": torch.zeros(100)}),
    ("scale", {"scale": torch.ones(3)}),
    ("scale", {"scale": torch.ones(N, dtype=torch.float16)}),
    ("qdata", {"qdata": torch.zeros(N, K)}),
    ("qdata", {"qdata": torch.zeros(N * K, dtype=torch.int8)}),
    ("x", {"x": torch.randn(2, 2 * K)}),
    ("x", {"x": torch.randn(2, K // 2)}),
    ("block", {"block": 0}),
    ("block", {"block": 48}),
]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("name", "changed"), BAD_INT8, ids=case_id)
def test_int8_linear_refuses(name, changed, compute):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        OPS.int8_linear(*int8_operands(**(changed | {"compute": compute})))


def test_the_operators_that_expand_and_round_refuse():
    w4: Any = quantize(torch.randn(N, K), "nf4", block=BLOCK)
    w8: Any = quantize(torch.randn(N, K), "int8", block=BLOCK)
    for rows, scale in ((2 * N, w4.scale), (N, w4.scale[:3]), (N, w4.scale.half())):
        with pytest.raises(ValueError, match="expected"):
            OPS.lut4_dequant(w4.qdata, scale, [], 0, None, w4.lut, rows, K, BLOCK, torch.float32)
    for scale in (w8.scale.flatten()[:3], w8.scale.half()):
        with pytest.raises(ValueError, match="scale: expected"):
            OPS.int8_dequant(w8.qdata, scale, BLOCK, torch.float32)
    with pytest.raises(ValueError, match="x: expected"):
        OPS.quantize_rows(torch.randn(K), torch.int8)
    with pytest.raises(ValueError, match="dtype: expected"):
        OPS.quantize_rows(torch.randn(2, K), torch.float16)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_right_bias_of_any_floating_type_is_added(scheme, compute, dtype):
    weight = quantize(torch.randn(N, K), scheme, block=BLOCK)
    bias, x = torch.randn(N), torch.randn(2, K)
    plain = KINDS[scheme](weight, compute=compute)(x)
    actual = KINDS[scheme](weight, bias.to(dtype), compute=compute)(x)
    torch.testing.assert_close(actual, plain + bias.to(dtype).float(), atol=1e-5, rtol=1e-5)


def layer_of(scheme, compute):
    weight = quantize(torch.randn(N, K), scheme, block=BLOCK)
    return KINDS[scheme](weight, torch.randn(N), compute=compute)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def every_second(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


PLACES = {
    "a tensor on cpu, .* got one on meta": lambda t: t.to("meta"),
    r"\d+ bytes for .*, got memory that has been freed": lambda t: freed(t.clone()),
    "contiguous memory, got strides": every_second,
}


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("scheme", KINDS)
@pytest.mark.parametrize("words", PLACES)
def test_layers_refuse_memory_that_is_elsewhere_or_gone(words, scheme, compute):
    """A kernel reads from addresses; the shapes of all of these are right."""
    for name in ("qdata", "scale", "lut", "bias"):
        layer = layer_of(scheme, compute)
        if name not in layer._buffers or (name == "bias" and "contiguous" in words):
            continue  # a bias is copied
        setattr(layer, name, PLACES[words](getattr(layer, name)))
        with torch.no_grad(), pytest.raises(ValueError, match=f"^{name}: expected {words}"):
            layer(torch.randn(2, K))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("scheme", KINDS)
def test_a_meta_input_of_a_layer_that_holds_numbers_is_refused(scheme, compute):
    """The operator's shapes for tracing would answer with memory that nobody wrote."""
    layer = layer_of(scheme, compute)
    with pytest.raises(ValueError, match=r"^qdata: expected a tensor on meta"):
        layer(torch.randn(2, K, device="meta"))
    assert layer.to("meta")(torch.randn(2, K, device="meta")).shape == (2, N)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("scheme", KINDS)
def test_parts_and_a_bias_that_are_strided_are_taken(scheme, compute):
    weight = quantize(torch.randn(N, K), scheme, block=BLOCK)
    bias, x = torch.randn(N), torch.ones(2, K)
    expected = KINDS[scheme](weight, bias, compute=compute)(x)
    names = [n for n in ("qdata", "scale", "lut") if hasattr(weight, n)]
    apart = replace(weight, **{name: every_second(getattr(weight, name)) for name in names})
    actual = KINDS[scheme](apart, every_second(bias), compute=compute)(every_second(x))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scheme", KINDS)
def test_a_bias_that_is_no_tensor_is_refused(scheme):
    with pytest.raises(TypeError, match=r"bias: expected a tensor \[8\] or None, got list"):
        KINDS[scheme](quantize(torch.randn(N, K), scheme, block=BLOCK), cast(Any, [0.0] * N))
