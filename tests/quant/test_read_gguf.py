"""Reading .gguf files: every weight as transformers expands it, or refused."""

import math
import struct
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastdistill.quant.formats.detect import (
    CheckpointError,
    is_quantized_checkpoint,
    open_checkpoint,
)
from fastdistill.quant.formats.gguf import q4_0, q8_0
from fastdistill.quant.schemes import CENTERED, Int8Weight, Lut4Weight
from helpers.gguf_writer import write
from helpers.stored import DTYPES, read_all, values


@pytest.mark.fast_cases(2)
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_equals_transformers(tmp_path, family, kind):
    write(tmp_path / "tiny.gguf", family, kind)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.method == "gguf"
    config = AutoConfig.for_model(**checkpoint.config)
    for dtype in DTYPES:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", dtype=dtype, config=config
        ).state_dict()
        assert set(checkpoint.weights) == set(theirs)
        for name, read in checkpoint.weights.items():
            weight = read()
            if not isinstance(weight, torch.Tensor):
                weight = values(weight, dtype)
            assert torch.equal(weight.to(dtype), theirs[name]), name


@pytest.mark.parametrize("kind, of", [("Q4_0", Lut4Weight), ("Q8_0", Int8Weight)])
def test_matrices_of_layers_stay_quantised_and_the_others_do_not(tmp_path, kind, of):
    state = write(tmp_path / "tiny.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path)  # the one .gguf file of a folder
    assert checkpoint.path == tmp_path / "tiny.gguf"
    assert is_quantized_checkpoint(tmp_path)
    assert is_quantized_checkpoint(tmp_path / "tiny.gguf")
    for name, read in checkpoint.weights.items():
        inside = name.startswith("model.layers.") and "norm" not in name
        weight = read()
        assert isinstance(weight, of if inside else torch.Tensor), name
        assert tuple(weight.shape) == tuple(state[name].shape)
        if inside:
            error = values(weight) - state[name]
            assert error.norm() < 0.15 * state[name].norm(), name


def test_a_head_of_another_type_is_expanded(tmp_path):
    gguf = pytest.importorskip("gguf")
    state = write(tmp_path / "tiny.gguf", kind="Q8_0", head_kind="Q5_1")
    kind = gguf.GGMLQuantizationType.Q5_1
    expected = gguf.dequantize(gguf.quantize(state["lm_head.weight"].numpy(), kind), kind)
    weight = open_checkpoint(tmp_path / "tiny.gguf").weights["lm_head.weight"]()
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, torch.from_numpy(expected))


def test_config_says_what_transformers_leaves_out(tmp_path):
    write(tmp_path / "qwen3.gguf", "qwen3")
    config = AutoConfig.for_model(**open_checkpoint(tmp_path / "qwen3.gguf").config)
    assert config.head_dim == 32
    write(tmp_path / "phi3.gguf", "phi3", fields=[("phi3.attention.sliding_window", 2047)])
    assert open_checkpoint(tmp_path / "phi3.gguf").config["sliding_window"] == 2047


def llama3_divisors(factor, width=16, context=8192):
    """As llama.cpp's converter writes them (LlamaModel.generate_extra_tensors)."""
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / width)
        if wavelength < context / 4:
            yield 1.0
        elif wavelength > context:
            yield factor
        else:
            smooth = (context / wavelength - 1) / 3
            yield 1 / ((1 - smooth) / factor + smooth)


def test_rescaled_rotary_frequencies_of_llama_3(tmp_path):
    divisors = np.array([*llama3_divisors(32.0, 64)], np.float32)
    file = tmp_path / "tiny.gguf"
    write(file, extra=[("rope_freqs.weight", divisors)], hidden_size=256)
    config = AutoConfig.for_model(**open_checkpoint(file).config)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    plain = 500000.0 ** -(torch.arange(32).double() / 32)
    assert torch.allclose(rotary.inv_freq.double(), plain / torch.from_numpy(divisors), rtol=1e-5)
    write(file, extra=[("rope_freqs.weight", divisors[::-1].copy())], hidden_size=256)
    with pytest.raises(CheckpointError, match=r"rope_freqs.*expected the rotary frequencies"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "made, words",
    [
        (dict(architecture="gemma2"), r"architecture: expected one of .*'llama'.*got 'gemma2'"),
        (dict(kind="Q5_0"), r"attn_\w+.weight.*of type Q4_0, Q8_0.*of Q5_0"),
        (dict(extra=[("blk.0.ffn_gate_exps.weight", np.ones((2, 32), np.float32))]), "experts"),
        (dict(extra=[("blk.0.attn_q.bias", np.ones(64, np.float32))]), "attn_q.bias"),
        (dict(extra=[("rope_factors_long.weight", np.ones(8, np.float32))]), "rotary"),
        (dict(fields=[("llama.rope.dimension_count", 8)]), "dimensions of a head, got 8"),
        (dict(fields=[("llama.rope.scaling.type", "yarn")]), "scaling.type: expected none.*'yarn'"),
        (dict(extra=[("blk.7.attn_q.weight", np.ones((2, 32), np.float32))]), "expected 3.*got 2"),
        (dict(fields=[("split.count", 3)]), "one of 3.*gguf-split --merge"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, made, words):
    file = tmp_path / "tiny.gguf"
    write(file, **made)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_all(file)
    assert "tiny.gguf" in str(caught.value)


def test_without_the_gguf_package(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"tiny.gguf.*pip install 'fastdistill\[gguf\]'"):
        open_checkpoint(tmp_path)


def test_blocks_of_q4_0_and_q8_0():
    """By hand, without the gguf package: 2 rows of 64, two blocks each."""
    rng = np.random.default_rng(0)
    scales = rng.standard_normal(4).astype(np.float16)
    nibbles = rng.integers(0, 256, (4, 16), dtype=np.uint8)
    data = b"".join(
        struct.pack("<e", d) + n.tobytes() for d, n in zip(scales, nibbles, strict=True)
    )
    weight = q4_0(torch.frombuffer(bytearray(data), dtype=torch.uint8), (2, 64))
    q = np.concatenate([nibbles & 15, nibbles >> 4], 1).astype(np.float32) - 8
    expected = (q * scales.astype(np.float32)[:, None]).reshape(2, 64)
    assert torch.equal(values(weight), torch.from_numpy(expected))
    assert weight.lut.tolist() == list(CENTERED)

    ints = rng.integers(-128, 128, (4, 32), dtype=np.int8)
    data = b"".join(struct.pack("<e", d) + n.tobytes() for d, n in zip(scales, ints, strict=True))
    eight_bit = q8_0(torch.frombuffer(bytearray(data), dtype=torch.uint8), (2, 64))
    expected = (ints.astype(np.float32) * scales.astype(np.float32)[:, None]).reshape(2, 64)
    assert torch.equal(values(eight_bit), torch.from_numpy(expected))
