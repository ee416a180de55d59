"""Reading FP8 in blocks and gpt-oss's MXFP4: the values of transformers' own dequantization."""

from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastdistill.quant.formats.detect import CheckpointError, open_checkpoint
from fastdistill.quant.formats.tensor_files import Expanded
from helpers.peer_formats import fp8, fp8_blocks
from helpers.stored import assert_planned, store, values

W = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4"}


def stored_fp8(tensors):
    return {W.replace("weight", part): tensor for part, tensor in tensors.items()}


def read(folder, tensors, config, name):
    checkpoint = open_checkpoint(store(folder, tensors, config))
    assert list(checkpoint.weights) == [name]
    weight: Any = checkpoint.weights[name]()
    assert_planned(folder, name, weight)
    return weight


@pytest.mark.parametrize("shape", [(256, 128), (130, 200), (1, 1)])
def test_blocks_of_fp8(tmp_path, shape):
    torch.manual_seed(0)
    tensors, expected = fp8_blocks(*shape)
    extra = {"activation_scale": torch.ones(1)}
    weight = read(tmp_path, stored_fp8(tensors | extra), FP8, W)
    assert isinstance(weight, Expanded)
    assert torch.equal(weight.values, expected.float())
    if shape == (256, 128):  # theirs takes whole blocks only
        theirs = Fp8Dequantize(None)._dequantize_one(*tensors.values(), torch.bfloat16)
        assert torch.equal(weight.values.bfloat16(), theirs)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_scales_of_other_types_and_stacked_experts(tmp_path, kind):
    """uint8 and E8M0 hold exponents of two."""
    torch.manual_seed(0)
    exponents = torch.randint(118, 130, (3, 2, 1), dtype=torch.uint8)
    powers = (exponents.double() - 127).exp2()
    scale = exponents if kind is torch.uint8 else powers.to(kind)
    codes = torch.randn(3, 150, 20).to(torch.float8_e4m3fn)
    tensors = {EXPERTS: codes, f"{EXPERTS}_scale_inv": scale}
    weight = read(tmp_path, tensors, FP8, EXPERTS)
    rows = powers.repeat_interleave(128, 1)[:, :150]
    assert torch.equal(weight.values.double(), codes.double() * rows)


def test_one_scale_for_a_tensor(tmp_path):
    tensors, _, expected = fp8(5, 6, "tensor", torch.float32)
    named = stored_fp8(
        {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"][0]}
    )
    weight = read(tmp_path, named, {"quant_method": "fp8"}, W)
    assert torch.equal(weight.values, expected.float())


def mxfp4(E=3, N=6, K=64, least=0, most=254):
    torch.manual_seed(0)
    return {
        f"{EXPERTS}_blocks": torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8),
        f"{EXPERTS}_scales": torch.randint(least, most + 1, (E, N, K // 32), dtype=torch.uint8),
    }


@pytest.mark.parametrize(("least", "most"), [(0, 254), (110, 130)])
def test_mxfp4(tmp_path, least, most):
    tensors = mxfp4(least=least, most=most)
    weight = read(tmp_path, tensors, MXFP4, EXPERTS)
    theirs = convert_moe_packed_tensors(*tensors.values(), dtype=torch.bfloat16).transpose(1, 2)
    assert (weight.shape, weight.block) == ((18, 64), 32)
    assert torch.equal(values(weight, torch.bfloat16).view(3, 6, 64), theirs)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"weight_scale_inv": torch.ones(2, 1)}, FP8, r"expected scales \[1, 1\] for \[4, 4\]"),
        ({"weight_scale_inv": torch.ones(1, 1).int()}, FP8, r"expected floating point or E8M0"),
        ({"weight": torch.ones(4, 4)}, FP8, r"weight': expected F8_E4M3.*got F32"),
        ({"weight": None}, FP8, r"weight', got none of that name"),
        ({"v.weight": torch.ones(4).to(torch.float8_e4m3fn)}, FP8, r"a scale with a weight of 8"),
        ({}, FP8 | {"weight_block_size": [0, 128]}, r"weight_block_size: expected two positive"),
        ({}, FP8 | {"weight_block_size": None}, None),
        ({}, FP8 | {"fmt": "e5m2"}, r"fmt: expected 'e4m3', got 'e5m2'"),
    ],
)
def test_fp8_that_does_not_fit_is_refused(tmp_path, tensors, config, words):
    stored = fp8_blocks(4, 4)[0] | tensors
    named = stored_fp8({part: tensor for part, tensor in stored.items() if tensor is not None})
    folder = store(tmp_path, named, config)
    if words is None:  # one scale for one block needs no size
        assert open_checkpoint(folder).weights[W]() is not None
        return
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder).weights[W]()


@pytest.mark.parametrize(
    ("part", "wrong", "words"),
    [
        ("scales", torch.full((3, 6, 2), 255, dtype=torch.uint8), "expected 0 to 254, got 255"),
        ("scales", torch.ones(3, 6, 3, dtype=torch.uint8), r"blocks': expected \[3, 6, 3, 16\]"),
        ("scales", torch.ones(18, 2, dtype=torch.uint8), r"scales': expected \['any', 'any'"),
        ("scales", torch.ones(0, 6, 2, dtype=torch.uint8), r"expected \[0, 6, 2, 16\]"),
        ("blocks", torch.ones(3, 6, 2, 16), r"blocks': expected .* of uint8"),
        ("scales", None, r"the tensors of mxfp4, because config.json says so, got plain"),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused(tmp_path, part, wrong, words):
    tensors = mxfp4() | {f"{EXPERTS}_{part}": wrong}
    folder = store(tmp_path, {n: t for n, t in tensors.items() if t is not None}, MXFP4)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder).weights[EXPERTS]()
