"""Reading compressed-tensors: every format, bit for bit, as the package itself expands it.

The cases are random bytes, packed here. What they mean is computed from the codes in fp64, and,
where the package is installed, by its own decompress.
"""

from typing import Any

import pytest
import torch

from fastdistill.quant.formats.detect import CheckpointError, open_checkpoint
from fastdistill.quant.formats.tensor_files import Expanded
from fastdistill.quant.schemes import Int8Weight, Lut4Weight
from helpers.peer_formats import BF16, FP16, FP32, fp4, fp8, integers, settings
from helpers.stored import assert_planned, store, values

LAYER = "model.layers.1.mlp.up_proj"


def in_bits(bits, *args, **options):
    return lambda: integers(bits, *args, **options)


INT, FLOAT = "int-quantized", "float-quantized"
CASES: dict[str, tuple[Any, str, type]] = {  # (how to make it, its format, what it becomes)
    "int4": (in_bits(4, 12, 64, 16), "pack-quantized", Lut4Weight),
    "int4 zeros": (in_bits(4, 13, 64, 32, False), "pack-quantized", Lut4Weight),
    "int4 rows": (in_bits(4, 5, 22, -1, False, FP16), "pack-quantized", Lut4Weight),
    "int4 tensor": (in_bits(4, 4, 20, None, True, FP32), "pack-quantized", Lut4Weight),
    "int4 act-order": (in_bits(4, 8, 64, 16, False, shuffled=True), "pack-quantized", Lut4Weight),
    "int4 odd": (in_bits(4, 3, 21, 7, False), "pack-quantized", Int8Weight),
    "int4 fp32 zeros": (in_bits(4, 8, 32, 16, False, FP32), "pack-quantized", Int8Weight),
    "int8": (in_bits(8, 6, 48, 16), "pack-quantized", Int8Weight),
    "int8 rows": (in_bits(8, 3, 19, -1, True, FP32), "pack-quantized", Int8Weight),
    "int8 zeros": (in_bits(8, 9, 32, 16, False), "pack-quantized", Expanded),
    "int8 act-order": (in_bits(8, 4, 32, 8, shuffled=True), "pack-quantized", Expanded),
    "w8 rows": (in_bits(8, 7, 33, -1, written="plain"), INT, Int8Weight),
    "w8 tensor": (in_bits(8, 7, 33, None, True, FP32, "plain"), INT, Int8Weight),
    "w8 zeros": (in_bits(8, 7, 33, -1, False, FP16, "plain"), INT, Expanded),
    "fp8 tensor": (lambda: fp8(7, 40, "tensor"), FLOAT, Expanded),
    "fp8 rows": (lambda: fp8(7, 41, "channel", FP32), FLOAT, Expanded),
    "fp8 block": (lambda: fp8(150, 129, "block"), FLOAT, Expanded),
    "fp8 small block": (lambda: fp8(10, 9, "block", FP32, (4, 2)), FLOAT, Expanded),
    "nvfp4": (lambda: fp4(6, 48, "nvfp4"), "nvfp4-pack-quantized", Lut4Weight),
    "mxfp4": (lambda: fp4(6, 96, "mxfp4"), "mxfp4-pack-quantized", Lut4Weight),
    "mxfp4 extremes": (lambda: fp4(4, 512, "mxfp4"), "mxfp4-pack-quantized", Lut4Weight),
}


def case(name):
    torch.manual_seed(sum(name.encode()))
    make, written, kind = CASES[name]
    return *make(), written, kind


def read(folder, tensors, config) -> Any:
    named = {f"{LAYER}.{part}": tensor for part, tensor in tensors.items()}
    checkpoint = open_checkpoint(store(folder, named, config))
    assert list(checkpoint.weights) == [f"{LAYER}.weight"]
    return checkpoint.weights[f"{LAYER}.weight"]()


def expand(weight, dtype=FP32):
    return weight.values.to(dtype) if isinstance(weight, Expanded) else values(weight, dtype)


@pytest.mark.parametrize("name", CASES)
def test_values(tmp_path, name):
    tensors, args, expected, written, kind = case(name)
    weight = read(tmp_path, tensors, settings(args, written))
    assert type(weight) is kind
    assert_planned(tmp_path, f"{LAYER}.weight", weight)
    assert torch.equal(expand(weight), expected.float())
    assert torch.equal(expand(weight, BF16), expected.float().bfloat16())


def test_block_structure_of_older_versions(tmp_path):
    tensors, args, expected, written, _ = case("fp8 small block")
    weight = read(tmp_path, tensors, settings(args | {"block_structure": "4x2"}, written))
    assert torch.equal(weight.values, expected.float())


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name in CASES if "act-order" not in name])
def test_values_of_the_package(tmp_path, name):
    package = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    tensors, args, _, written, _ = case(name)
    scheme = package.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(written)
    theirs = compressor.decompress(tensors, scheme)["weight"]
    ours = expand(read(tmp_path, tensors, settings(args, written)), theirs.dtype)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("int4", {"weight_scale": torch.ones(12, 3).bfloat16()}, r"one of config_groups \(int4 by"),
        (
            "int4",
            {"weight_zero_point": torch.ones(2, 4).int()},
            r"\[12, 4\] and a zero point",
        ),
        (
            "int4",
            {"weight_shape": torch.tensor([12, 1 << 50])},
            r"_shape': expected \[N, K\]",
        ),
        ("int4", {"weight_shape": torch.tensor([13, 64])}, r"weight_shape': .*got \[13, 64\]"),
        ("int4", {"weight_shape": torch.ones(2)}, r"weight_shape': .*got \[2\] of torch.float32"),
        ("int4", {"weight_shape": None}, r"weight_shape', got none of that name"),
        (
            "int4",
            {"weight_packed": torch.ones(12).int()},
            r"_packed': expected a matrix of I32",
        ),
        ("int4", {"weight_packed": torch.ones(12, 0).int()}, r"a matrix that is not empty"),
        ("int4", {"weight_packed": None}, r"up_proj.weight', got none of that name"),
        ("int4", {"weight_scale": None}, r"weight_scale', got none of that name"),
        (
            "int4 zeros",
            {"weight_zero_point": torch.ones(1, 2).int()},
            r"zero_point': .*\[2, 2\]",
        ),
        ("int4 act-order", {"weight_g_idx": torch.zeros(64).int()}, r"expected 16 columns in each"),
        (
            "nvfp4",
            {"weight_global_scale": torch.zeros(1)},
            r"one positive number, got \[1\]",
        ),
        ("nvfp4", {"weight_global_scale": None}, r"weight_global_scale', got none of that name"),
        ("nvfp4", {"weight_scale": torch.ones(6, 3).int()}, r"expected floating point or E8M0"),
        (
            "mxfp4",
            {"weight_scale": torch.full((6, 3), 255).byte()},
            r"got 255, which is NaN",
        ),
        (
            "w8 rows",
            {"weight": torch.ones(7, 33)},
            r"a matrix of I32, I8, .*got .* of F32",
        ),
        (
            "w8 zeros",
            {"weight_zero_point": torch.ones(7).char()},
            r"_point': expected \[7, 1\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, name, changes, words):
    tensors, args, _, written, _ = case(name)
    tensors = {n: t for n, t in (tensors | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=words) as error:
        read(tmp_path, tensors, settings(args, written))
    assert "model.safetensors" in str(error.value) or "got none" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"format": "marlin-24"},
            r"format: expected one of .*got 'marlin-24'; save it",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, r"got 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, r"no transforms of activations"),
        (
            {"config_groups": {"W4A16": ["Linear"]}},
            r"W4A16: expected an object, got list",
        ),
        ({"config_groups": []}, r"config.json"),
        ({"config_groups": {"g": {"weights": {"num_bits": 3}}}}, r"num_bits: expected 4 or 8 bits"),
        ({"config_groups": {}}, r"config_groups \(none\), got \[12, 64\] of int with 4 bits"),
    ],
)
def test_settings_that_are_not_supported_are_refused(tmp_path, changes, words):
    tensors, args, _, written, _ = case("int4")
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, tensors, settings(args, written) | changes)
