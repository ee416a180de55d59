"""Every type of GGUF tensors, with the bits of the gguf package."""

import numpy as np
import pytest
import torch

from fastdistill.quant.formats.gguf_types import OTHERS, TYPES, expanded, quantized
from fastdistill.quant.linear import dequantize

QUANTIZED = {number: kind for number, kind in TYPES.items() if kind.unpack is not None}


@pytest.mark.peers
@pytest.mark.parametrize("number", QUANTIZED, ids=lambda number: TYPES[number].name)
def test_random_blocks_have_the_bits_of_gguf(number):
    gguf = pytest.importorskip("gguf")
    kind = TYPES[number]
    data = np.random.default_rng(0).integers(0, 256, (64, 2 * kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind.name])
    fine = np.isfinite(expected).all(1)
    data, expected = data[fine], torch.from_numpy(expected[fine])
    assert len(data) > 32

    def chunks():
        return iter(torch.from_numpy(data.reshape(-1, kind.bytes)).split(5))

    assert torch.equal(expanded(kind, expected.shape, chunks()), expected)
    assert kind.is_exact == (kind.name not in ("Q5_1", "Q5_K"))
    if kind.is_exact:
        rows, columns = expected.shape
        weight = quantized(kind, (rows, columns), chunks())
        assert torch.equal(dequantize(weight), expected)
        parts = {"qdata", "scale", "offset"} & vars(weight).keys()
        tensors = [vars(weight)[part] for part in parts if vars(weight)[part] is not None]
        assert 8 * sum(tensor.nbytes for tensor in tensors) / expected.numel() == kind.bits


@pytest.mark.peers
def test_numbers_names_and_sizes_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind in TYPES:
            ours = TYPES[kind]
            assert (ours.name, ours.values, ours.bytes) == (kind.name, *sizes)
        else:
            assert OTHERS[kind] == kind.name


def test_blocks_of_a_type_with_an_offset_by_hand():
    """Q4_1: d = 2, m = −1, then bytes with values 0 to 15 in the low nibbles and 3 in the high."""
    halves = torch.tensor([2.0, -1.0], dtype=torch.float16).view(torch.uint8)
    block = torch.cat([halves, torch.arange(16, dtype=torch.uint8) | 3 << 4])[None]
    expected = torch.cat([2.0 * torch.arange(16) - 1, torch.full((16,), 5.0)])[None]
    assert torch.equal(dequantize(quantized(TYPES[3], (1, 32), iter([block]))), expected)
    assert torch.equal(expanded(TYPES[3], (32,), iter([block])), expected[0])
