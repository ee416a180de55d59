"""Reading GPTQ and AWQ checkpoints: (q − zero) · scale, bit for bit.

The writers below pack as AutoGPTQ's and AutoAWQ's QuantLinear do, one nibble at a time, from random
codes; what a layer means is computed from the codes before they are packed.
"""

from typing import Any

import pytest
import torch

from fastdistill.quant.formats.awq import ORDER
from fastdistill.quant.formats.detect import CheckpointError, open_checkpoint
from fastdistill.quant.formats.tensor_files import Expanded
from fastdistill.quant.schemes import UNSIGNED
from helpers.stored import DTYPES, assert_planned, golden, store, values, write_golden

LAYER = "model.layers.1.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def pack(codes, order=range(8)):
    """int32 [rows, columns / 8]: nibble i of a word is column order[i] of its eight."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for i, place in enumerate(order):
            words[:, column] |= codes[:, 8 * column + place] << 4 * i
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def codes_of(N, K, groups, seed=0, scale_dtype=torch.float16):
    """(q [K, N], zero [G, N], scale [G, N], what they mean in fp64 [N, K])."""
    torch.manual_seed(seed)
    count = int(groups.max()) + 1
    q, zero = torch.randint(16, (K, N)), torch.randint(16, (count, N))
    zero[0, :2] = torch.tensor([0, 15])
    scale = (torch.randn(count, N) * 0.01).to(scale_dtype)
    scale[0, :4] = torch.tensor([0.0, 6e-8, 60000.0, -0.01], dtype=scale_dtype)
    return q, zero, scale, ((q - zero[groups]) * scale[groups].double()).t()


def gptq(q, zero, scale, groups=None, less=1):
    g_idx = {} if groups is None else {f"{LAYER}.g_idx": groups.int()}
    return {
        f"{LAYER}.qweight": pack(q.t()).t().contiguous(),
        f"{LAYER}.qzeros": pack((zero - less) % 16),
        f"{LAYER}.scales": scale,
        **g_idx,
    }


def awq(q, zero, scale):
    return {
        f"{LAYER}.qweight": pack(q, ORDER),
        f"{LAYER}.qzeros": pack(zero, ORDER),
        f"{LAYER}.scales": scale,
    }


def read(folder, tensors, settings):
    checkpoint = open_checkpoint(store(folder, tensors, settings))
    assert list(checkpoint.weights) == [f"{LAYER}.weight"]
    assert checkpoint.method == settings["quant_method"]
    weight: Any = checkpoint.weights[f"{LAYER}.weight"]()
    assert_planned(folder, f"{LAYER}.weight", weight)
    return weight


def assert_means(weight, expected):
    """Rounded once from the exact value, in every type."""
    assert torch.equal(values(weight).double(), expected)
    for dtype in DTYPES:
        assert torch.equal(values(weight, dtype), expected.float().to(dtype))


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "gptq_act_order", "awq"])
def test_golden_bytes(tmp_path, name):
    held = golden("gptq_awq")[name]
    settings = AWQ if name == "awq" else GPTQ
    if name == "gptq_v2":
        settings = settings | {"checkpoint_format": "gptq_v2"}
    if name == "gptq_act_order":
        settings = settings | {"desc_act": True}
    assert_means(read(tmp_path, held["tensors"], settings), held["values"]["float32"].double())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version, less", [("gptq", 1), ("gptq_v2", 0), (None, 1)])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_gptq(tmp_path, group, version, less, scale_dtype):
    N, K = 48, 256
    groups = torch.arange(K) // (K if group == -1 else group)
    q, zero, scale, expected = codes_of(N, K, groups, scale_dtype=scale_dtype)
    for stored in (None, groups):  # a g_idx in order is none
        settings = (
            GPTQ | {"group_size": group} | ({"checkpoint_format": version} if version else {})
        )
        folder = tmp_path / str(stored is None)
        weight = read(folder, gptq(q, zero, scale, stored, less), settings)
        assert_means(weight, expected)
        assert weight.perm is None
        assert weight.block == (K if group == -1 else group)
        assert weight.lut.tolist() == list(UNSIGNED)


@pytest.mark.parametrize("seed", [0, 1])
def test_act_order_is_sorted_once(tmp_path, seed):
    N, K, group = 24, 128, 32
    torch.manual_seed(seed)
    groups = (torch.arange(K) // group)[torch.randperm(K)]
    q, zero, scale, expected = codes_of(N, K, groups, seed)
    weight = read(tmp_path, gptq(q, zero, scale, groups), GPTQ | {"desc_act": True})
    assert_means(weight, expected)
    assert weight.block == group
    assert torch.equal(groups[weight.perm], groups.sort().values)
    assert torch.equal(weight.perm.sort().values, torch.arange(K))


@pytest.mark.parametrize(
    "K, group, block", [(96, 64, 32), (80, 32, 16), (48, 20, 4), (40, 128, 40)]
)
def test_a_short_last_group_makes_smaller_blocks(tmp_path, K, group, block):
    groups = torch.arange(K) // group
    q, zero, scale, expected = codes_of(16, K, groups)
    weight = read(tmp_path, gptq(q, zero, scale), GPTQ | {"group_size": group})
    assert weight.block == block
    assert_means(weight, expected)


def test_groups_without_an_even_part_are_refused(tmp_path):
    groups = torch.arange(40) // 15
    tensors = gptq(*codes_of(16, 40, groups)[:3])
    with pytest.raises(CheckpointError, match=r"up_proj.*even divisor, got a greatest .* of 5"):
        read(tmp_path, tensors, GPTQ | {"group_size": 15})


@pytest.mark.parametrize("version", ["gemm", "GEMM"])
@pytest.mark.parametrize("group", [16, 64, -1])
def test_awq(tmp_path, group, version):
    N, K = 48, 128
    groups = torch.arange(K) // (K if group == -1 else group)
    q, zero, scale, expected = codes_of(N, K, groups)
    settings = AWQ | {"group_size": group, "version": version}
    assert_means(read(tmp_path, awq(q, zero, scale), settings), expected)


def gptq_of_8_bits(N, K, groups, symmetric, less):
    """(tensors, their values): four bytes to a word."""
    torch.manual_seed(3)
    count = int(groups.max()) + 1
    q = torch.randint(256, (K, N))
    zero = torch.full((count, N), 128) if symmetric else torch.randint(256, (count, N))
    scale = (torch.randn(count, N) * 0.01).half()

    def words(bytes_):  # [rows, columns] -> int32 [rows, columns / 4]
        return bytes_.to(torch.uint8).contiguous().view(torch.int32)

    tensors = {
        f"{LAYER}.qweight": words(q.t()).t().contiguous(),
        f"{LAYER}.qzeros": words((zero - less) % 256),
        f"{LAYER}.scales": scale,
        f"{LAYER}.g_idx": groups.int(),
    }
    return tensors, ((q - zero[groups]) * scale[groups].double()).t()


@pytest.mark.parametrize(
    ("version", "less", "symmetric", "K", "group"),
    [("gptq", 1, True, 128, 32), ("gptq_v2", 0, True, 80, 32), ("gptq", 1, False, 128, -1)],
)
def test_gptq_of_8_bits(tmp_path, version, less, symmetric, K, group):
    groups = torch.arange(K) // (K if group == -1 else group)
    tensors, expected = gptq_of_8_bits(12, K, groups, symmetric, less)
    settings = GPTQ | {"bits": 8, "group_size": group, "checkpoint_format": version}
    settings["sym"] = symmetric
    weight = read(tmp_path, tensors, settings)
    if symmetric:
        assert weight.block == (32 if K == 128 else 16)
        assert_means(weight, expected)
    else:
        assert isinstance(weight, Expanded)
        assert torch.equal(weight.values.double(), expected)


def test_act_order_of_8_bits_is_expanded(tmp_path):
    groups = (torch.arange(64) // 32)[
        torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ]
    tensors, expected = gptq_of_8_bits(8, 64, groups, True, 1)
    weight = read(tmp_path, tensors, GPTQ | {"bits": 8, "desc_act": True})
    assert isinstance(weight, Expanded)
    assert torch.equal(weight.values.double(), expected)


def test_awq_with_old_names_of_the_settings(tmp_path):
    q, zero, scale, expected = codes_of(16, 64, torch.arange(64) // 32)
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "gemm"}
    assert_means(read(tmp_path, awq(q, zero, scale), settings), expected)


def test_other_tensors_come_as_stored(tmp_path):
    q, zero, scale, _ = codes_of(16, 64, torch.arange(64) // 32)
    bias, head = torch.randn(16).half(), torch.randn(8, 4).half()
    tensors = gptq(q, zero, scale) | {f"{LAYER}.bias": bias, "lm_head.weight": head}
    weights = open_checkpoint(store(tmp_path, tensors, GPTQ)).weights
    assert set(weights) == {f"{LAYER}.weight", f"{LAYER}.bias", "lm_head.weight"}
    stored_head = weights["lm_head.weight"]()
    assert isinstance(stored_head, torch.Tensor)
    assert torch.equal(stored_head, head)


@pytest.mark.parametrize(
    "settings, words",
    [
        (GPTQ | {"bits": 3}, "bits: expected 4 or 8, got 3"),
        (GPTQ | {"bits": "4"}, "bits: expected an integer, got '4'"),
        (GPTQ | {"group_size": 0}, "group_size: expected a positive number or -1, got 0"),
        (GPTQ | {"group_size": 1 << 70}, "group_size: expected a positive number or -1, got 118"),
        (GPTQ | {"group_size": None}, "group_size: expected an integer, got None"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format.*'marlin'.*GPTQModel"),
        ({"quant_method": "gptq"}, "expected an entry 'bits'"),
        (AWQ | {"version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
        (AWQ | {"bits": 8}, "bits: expected 4, got 8"),
        (AWQ | {"group_size": 48}, "scales': expected 2 rows for 64 columns in groups of 48"),
        (GPTQ | {"group_size": 16}, r"expected groups 0 to 1.*got 0 to 3"),
        (GPTQ | {"group_size": 64}, r"expected 1 rows of .*got 2: some would be unused"),
        (GPTQ | {"group_size": -1}, r"expected 1 rows of .*group_size: -1.*got 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, words):
    codes = codes_of(16, 64, torch.arange(64) // 32)[:3]
    make = gptq if settings["quant_method"] == "gptq" else awq
    if settings.get("group_size") == 48:
        codes = codes_of(16, 64, torch.arange(64) // 20)[:3]
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, make(*codes), settings)


@pytest.mark.parametrize(
    "part, wrong, words",
    [
        ("qweight", torch.zeros(8, 12, dtype=torch.int32), "N a multiple of 8"),
        ("qweight", torch.zeros(8, 16), "expected .* of int32"),
        ("qweight", torch.zeros(8, dtype=torch.int32), "expected .* of int32"),
        ("qzeros", torch.zeros(3, 2, dtype=torch.int32), r"expected \[2, 2\] of int32"),
        ("scales", torch.zeros(2, 16), "expected .* of float16"),
        ("scales", torch.zeros(2, 8).half(), r"expected \['any', 16\] of float16"),
        ("g_idx", torch.full((64,), 2, dtype=torch.int32), "expected groups 0 to 1"),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32), "expected groups 0 to 1"),
        ("g_idx", torch.zeros(32, dtype=torch.int32), r"expected \[64\] of int32"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "expected 1 rows of .*got 2"),
        ("qzeros", None, "incomplete"),
        ("scales", None, "incomplete"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, part, wrong, words):
    tensors = gptq(*codes_of(16, 64, torch.arange(64) // 32)[:3])
    tensors.pop(f"{LAYER}.{part}", None)
    if wrong is not None:
        tensors[f"{LAYER}.{part}"] = wrong
    with pytest.raises(CheckpointError, match=words) as caught:
        read(tmp_path, tensors, GPTQ)
    assert f"{LAYER}.{part}" in str(caught.value)


def _golden_cases():
    groups = torch.arange(64) // 32
    shuffled = groups[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for name, of_column in (("gptq", groups), ("gptq_v2", groups), ("gptq_act_order", shuffled)):
        q, zero, scale, expected = codes_of(8, 64, of_column)
        stored = of_column if name == "gptq_act_order" else None
        tensors = gptq(q, zero, scale, stored, less=int(name != "gptq_v2"))
        yield name, {"tensors": tensors, "values": {"float32": expected.float()}}
    q, zero, scale, expected = codes_of(8, 64, groups)
    yield "awq", {"tensors": awq(q, zero, scale), "values": {"float32": expected.float()}}


if __name__ == "__main__":
    write_golden("gptq_awq", "the packers of test_read_gptq_awq.py", dict(_golden_cases()))
