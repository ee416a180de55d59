"""Bringing weights into 4 and 8 bits: bitsandbytes' bytes, errors where they should be."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace

import pytest
import torch

from fastdistill.quant.linear import dequantize
from fastdistill.quant.schemes import (
    FP4,
    NF4,
    SCHEMES,
    Lut4Weight,
    Nested,
    int8_table,
    pack_nibbles,
    quantize,
    table,
    unpack_nibbles,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def pattern(rows: int, cols: int) -> torch.Tensor:
    """Weights that any machine makes the same: no random generator, no transcendental function."""
    i = torch.arange(rows * cols, dtype=torch.float64)
    return (((i * 7919) % 2003 - 1001) / 1001 * ((i * 31) % 17 + 1) / 400).view(rows, cols).float()


def digest(*tensors: torch.Tensor) -> str:
    joined = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()[:16]


def bitsandbytes():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    return functional


# sha256 of the packed bytes and absmax that bitsandbytes 0.50.2 gives for pattern(48, 160).
GOLDEN = {
    ("nf4", 64): "6facbae569dfbc09",
    ("nf4", 256): "a22cce52bf831ab6",
    ("fp4", 64): "bcd2afb4c0ac7848",
    ("fp4", 128): "1d511f99d98ae90f",
}


@pytest.mark.parametrize(("scheme", "block"), GOLDEN)
def test_bytes_are_those_that_bitsandbytes_gave(scheme, block):
    made = quantize(pattern(48, 160), scheme, block=block)
    assert isinstance(made.scale, torch.Tensor)
    assert digest(made.qdata, made.scale) == GOLDEN[scheme, block]


@pytest.mark.peers
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024])
def test_equal_to_bitsandbytes(scheme, dtype, block):
    bnb = bitsandbytes()
    for scale in (0.02, 1e-3):  # whole blocks per row: else bitsandbytes dequantises wrongly
        weight = (torch.randn(32, 1024) * scale).to(dtype)
        weight[3, :64] = 0  # a block of zeros
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed, state = bnb.quantize_4bit(weight, quant_type=scheme, blocksize=block)
        made = quantize(weight, scheme, block=block)
        assert isinstance(made, Lut4Weight)
        assert isinstance(made.scale, torch.Tensor)
        assert torch.equal(made.qdata, packed.view(-1))
        assert torch.equal(made.scale, state.absmax.float())
        assert torch.equal(made.lut, state.code)
        for out in FLOATS:
            state.dtype = out
            assert torch.equal(dequantize(made, out), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(3, 50), (5, 33), (1, 1), (7, 64), (2, 65)])
def test_blocks_run_over_rows_and_the_last_may_be_short(shape):
    weight = torch.randn(shape) * 0.1
    flat = weight.reshape(-1)
    for scheme in ("nf4", "fp4", "int4"):
        made = quantize(weight, scheme)
        w = dequantize(made).view(-1)
        for start in range(0, flat.numel(), 64):
            block = flat[start : start + 64]
            top = block.abs().max()
            assert (w[start : start + 64] - block).abs().max() <= 0.2 * top
            if scheme != "int4":
                assert made.scale[start // 64] == top


@pytest.mark.parametrize(
    ("scheme", "least", "most"),
    [
        ("nf4", 0.085, 0.095),
        ("fp4", 0.11, 0.13),
        ("int4", 0.085, 0.095),
        ("int8", 0.005, 0.009),
    ],
)
def test_error_on_a_normal_weight(scheme, least, most):
    weight = torch.randn(128, 512)
    error = (dequantize(quantize(weight, scheme)) - weight).norm() / weight.norm()
    assert least < error < most


def test_table_entries_and_halfways():
    for scheme in ("nf4", "fp4"):
        lut = table(scheme)
        made = quantize(lut.view(1, 16), scheme)
        assert torch.equal(dequantize(made), lut.view(1, 16))
    middle = (torch.tensor(NF4[7:9]).sum() / 2).item()
    halfway = quantize(torch.tensor([[1.0, middle]]), "nf4")
    assert unpack_nibbles(halfway.qdata, 2).tolist() == [15, 7]  # the lower one
    assert FP4[3] == 1.0


def test_zero_and_constant_blocks():
    for scheme in SCHEMES:
        assert torch.equal(dequantize(quantize(torch.zeros(4, 64), scheme)), torch.zeros(4, 64))
    constant = torch.full((2, 64), 0.3)
    assert torch.equal(dequantize(quantize(constant, "int4")), constant)


def test_nibbles():
    q = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert pack_nibbles(q).tolist() == [0x12, 0x30]
    assert torch.equal(unpack_nibbles(pack_nibbles(q), 3), q)


def test_int8_tables():
    codes, unit = int8_table(table("int4"))
    assert (codes.tolist(), unit) == (list(range(16)), 1.0)  # integers are kept exactly
    codes, unit = int8_table(table("nf4"))
    assert (codes.float() * unit - table("nf4")).abs().max() <= 0.5 / 127 + 1e-6
    assert codes[0] == -127


def test_nested_scales():
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    code, scale = torch.linspace(-1, 1, 256), torch.tensor([2.0, 3.0])
    nested = Nested(codes, code, scale, torch.tensor(5.0), 256)
    expected = torch.cat([code * 2 + 5, code * 3 + 5])
    assert torch.equal(nested.expand(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: quantize(w, "nf5"), "scheme: expected one of .*got 'nf5'"),
        (lambda w: quantize(w.int(), "nf4"), r"weight: expected a floating-point \[N, K\]"),
        (
            lambda w: quantize(w[0], "nf4"),
            r"weight: expected a floating-point \[N, K\], got \[64\]",
        ),
        (lambda w: quantize(w, "nf4", block=63), "block: expected an even number"),
        (lambda w: quantize(w * torch.nan, "nf4"), "weight: expected finite values"),
        (lambda w: quantize(w * torch.inf, "int8"), "weight: expected finite values"),
        (
            lambda w: replace(quantize(w, "nf4"), qdata=torch.zeros(5, dtype=torch.uint8)),
            "qdata: expected 128 values of uint8",
        ),
        (
            lambda w: replace(quantize(w, "nf4"), scale=torch.ones(4).half()),
            "scale: expected 4 values of float32, got .* of float16",
        ),
        (
            lambda w: replace(quantize(w, "int8"), block=60),
            "block: expected a divisor of the row length",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.randn(4, 64))
