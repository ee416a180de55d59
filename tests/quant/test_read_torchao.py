"""Reading torchao's tensors: their values from the codes, and as torchao itself expands them."""

import itertools
import json
import shlex
import shutil
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from fastdistill.quant.formats import torchao
from fastdistill.quant.formats.detect import CheckpointError, open_checkpoint
from fastdistill.quant.formats.tensor_files import Expanded
from fastdistill.quant.loading import load_expanded
from fastdistill.quant.schemes import Int8Weight, Lut4Weight
from helpers.stored import assert_planned, store, values

LAYER = "model.layers.0.mlp.up_proj"
CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}


def entry(kind, block, shape=None):
    data = {"block_size": block, "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    data |= {"shape": shape} if shape else {}
    return {f"{LAYER}.weight": json.dumps({"_type": kind, "_data": data})}


def read(folder, parts, metadata, config=CONFIG):
    tensors = {f"{LAYER}._weight_{part}": t for part, t in parts.items() if t is not None}
    checkpoint = open_checkpoint(store(folder, tensors, config, metadata))
    assert list(checkpoint.weights) == [f"{LAYER}.weight"]
    return checkpoint.weights[f"{LAYER}.weight"]()


def random_parts(N, K, rows, columns, bits=8, zeros=False):
    torch.manual_seed(0)
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (N, K), dtype=torch.int8)
    scale = torch.rand(N // rows, K // columns).bfloat16()
    zero = torch.randint(-128, 128, scale.shape, dtype=torch.int8) if zeros else None
    return {"qdata": q, "scale": scale, "zero_point": zero}


def meaning(parts, rows, columns):
    def of_each(tensor):
        return tensor.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    zero = 0 if parts["zero_point"] is None else of_each(parts["zero_point"])
    return (parts["qdata"].double() - zero) * of_each(parts["scale"])


def expand(weight):
    return weight.values if isinstance(weight, Expanded) else values(weight)


@pytest.mark.parametrize(
    ("kind", "tile", "bits", "zeros", "becomes"),
    [
        ("Int8Tensor", (1, 24), 8, False, Int8Weight),
        ("Int8Tensor", (6, 24), 8, False, Int8Weight),
        ("Int8Tensor", (1, 24), 8, True, Expanded),
        ("IntxUnpackedToInt8Tensor", (1, 8), 4, False, Lut4Weight),
        ("IntxUnpackedToInt8Tensor", (1, 3), 4, False, Int8Weight),
    ],
)
def test_integers(tmp_path, kind, tile, bits, zeros, becomes):
    rows, columns = tile
    parts = random_parts(6, 24, rows, columns, bits, zeros)
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}
    if zeros:
        data["mapping_type"] = {"_type": "MappingType", "_data": "ASYMMETRIC"}
    config = CONFIG | {"quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": data}}}
    weight = read(tmp_path, parts, entry(kind, tile), config)
    assert type(weight) is becomes
    assert_planned(tmp_path, f"{LAYER}.weight", weight)
    assert torch.equal(expand(weight), meaning(parts, *tile).float())


def test_floats(tmp_path):
    parts = random_parts(6, 24, 1, 24) | {"qdata": torch.randn(6, 24).to(torch.float8_e4m3fn)}
    weight = read(tmp_path, parts, entry("Float8Tensor", [1, 24]))
    assert isinstance(weight, Expanded)
    assert torch.equal(weight.values, meaning(parts, 1, 24).float())


def tiled(q):
    """Words of codes [N, K], N of 8 and K of 128, by the kernel's description of its threads."""
    N, K = q.shape
    words = torch.zeros(N // 8, K // 128, 32, 4, dtype=torch.int64)
    for i, j, t, inner in itertools.product(*map(range, words.shape)):
        first = 16 * (8 * j + 2 * inner) + 2 * (t % 4)
        columns = [first, first + 1, first + 8, first + 9]
        v = [int(q[8 * i + t // 4, k]) for k in (*columns, *(k + 16 for k in columns))]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        words[i, j, t, inner] = sum(v[k] << 4 * at for at, k in enumerate(order))
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


@pytest.mark.parametrize("kind", ["Int4Tensor", "Int4TilePackedTo4dTensor"])
def test_packed_codes_with_zeros_that_are_added(tmp_path, kind):
    torch.manual_seed(0)
    N, K, group = 12, 96, 32
    q = torch.randint(16, (16, 128))  # padded
    scale, zero = (torch.randn(128 // group, 16).bfloat16() for _ in range(2))
    if kind == "Int4Tensor":
        q, scale, zero = q[:N, :K], scale[: K // group, :N], zero[: K // group, :N]
        signed = (q - 8) & 15
        packed = (signed[:, ::2] | signed[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
        parts = {"qdata": packed, "scale": scale.contiguous(), "zero_point": zero.contiguous()}
    else:
        parts = {"qdata": tiled(q), "scale_and_zero": torch.stack([scale, zero], -1)}
    weight = read(tmp_path, parts, entry(kind, [1, group], [N, K]))
    assert isinstance(weight, Lut4Weight)
    assert_planned(tmp_path, f"{LAYER}.weight", weight)
    steps = (q - 8)[:N, :K].float()
    scale, zero = (x.float().t()[:N].repeat_interleave(group, 1)[:, :K] for x in (scale, zero))
    assert torch.equal(values(weight), steps * scale + zero)


def test_activations_are_noted(tmp_path):
    kind = {"default": {"_type": "Int8DynamicActivationInt8WeightConfig"}}
    tensors = {
        f"{LAYER}._weight_{n}": t for n, t in random_parts(2, 4, 1, 4).items() if t is not None
    }
    metadata = entry("Int8Tensor", [1, 4])
    folder = store(tmp_path, tensors, CONFIG | {"quant_type": kind}, metadata)
    assert "activations are not quantized here" in open_checkpoint(folder).notes[0]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["int8", "int4", "int4 asymmetric", "fp8"])
def test_values_of_the_package(tmp_path, name):
    package = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    groups = {"weight_dtype": vars(torch)["int4"], "granularity": package.PerGroup(16)}
    asymmetric = {"mapping_type": package.MappingType.ASYMMETRIC}
    config = {
        "int8": lambda: package.Int8WeightOnlyConfig(),
        "int4": lambda: package.IntxWeightOnlyConfig(**groups),
        "int4 asymmetric": lambda: package.IntxWeightOnlyConfig(**groups, **asymmetric),
        "fp8": lambda: package.Float8WeightOnlyConfig(),
    }[name]()
    torch.manual_seed(0)
    linear = nn.Linear(48, 12, bias=False, dtype=torch.bfloat16)
    package.quantize_(linear, config)
    named = {f"{LAYER}.weight": linear.weight.data}
    tensors, metadata = support.flatten_tensor_state_dict(named)
    weight = open_checkpoint(store(tmp_path, tensors, CONFIG, metadata)).weights
    ours = expand(weight[f"{LAYER}.weight"]()).bfloat16()
    assert torch.equal(ours, linear.weight.data.dequantize())


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_command_for_another_type_expands_the_checkpoint(folder, tmp_path, monkeypatch):
    package = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(package.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    for file in folder.glob("*token*"):
        shutil.copy(file, tmp_path / "int8")
    expected = load_expanded(tmp_path / "int8").state_dict()
    monkeypatch.setattr(torchao, "_TYPES", ())
    with pytest.raises(CheckpointError, match=r"_type: expected .*; expand it") as caught:
        open_checkpoint(tmp_path / "int8")
    _, _, code, *arguments = shlex.split(str(caught.value)[str(caught.value).index("python -c") :])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    monkeypatch.chdir(tmp_path)
    exec(code)
    read = AutoModelForCausalLM.from_pretrained("expanded").state_dict()
    torch.testing.assert_close(dict(read), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "metadata", "words"),
    [
        ({}, entry("Int4PlainInt32Tensor", [1, 8]), r"_type: expected one of .*dequantize\(\)"),
        ({}, entry("Int4Tensor", [1, 8]), r"expected an entry 'shape', got none"),
        (
            {},
            entry("Int4Tensor", [1, 8], [6, 50]),
            r"expected \[1, an even divisor of 50 columns\]",
        ),
        ({}, entry("Int4Tensor", [1, 8], [6, 48]), r"zero_point', got none of that name"),
        (
            {},
            entry("Int4TilePackedTo4dTensor", [1, 8], [6, 48]),
            r"\[1, 'any', 32, 'any'\] of int32",
        ),
        ({}, entry("Int8Tensor", [1, 0]), r"block_size: expected two positive integers"),
        ({}, entry("Int8Tensor", None), r"block_size: expected two positive integers"),
        ({}, entry("Int8Tensor", [1, 5]), r"qdata': expected whole blocks of 1 × 5"),
        ({}, {f"{LAYER}.weight": "["}, r"metadata of model.layers.0.mlp.up_proj.weight"),
        ({}, {"format": "pt"}, r"expected an entry 'model.layers.0.mlp.up_proj.weight', got none"),
        ({"scale": torch.ones(6, 2)}, entry("Int8Tensor", [1, 8]), r"scale': expected \[6, 3\]"),
        ({"scale": None}, entry("Int8Tensor", [1, 8]), r"scale', got none of that name"),
        ({"zero_point": torch.ones(6, 3)}, entry("Int8Tensor", [1, 8]), r"\[6, 3\] of int8"),
        ({"qdata": torch.ones(6, 24)}, entry("Int8Tensor", [1, 8]), r"expected .* of int8"),
        ({"act_pre_scale": torch.ones(24)}, entry("Int8Tensor", [1, 8]), r"expected weights alone"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, changes, metadata, words):
    parts = random_parts(6, 24, 1, 8) | changes
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, parts, metadata)
