"""The metadata of a .gguf file is used, or refused by the name of the field."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastdistill.quant.formats.detect import CheckpointError, open_checkpoint
from fastdistill.quant.formats.gguf_config import read_config
from fastdistill.quant.formats.gguf_header import GGUFHeader, GGUFTensor
from fastdistill.quant.formats.gguf_metadata import read_metadata
from fastdistill.quant.formats.gguf_types import TYPES
from helpers.gguf_writer import write

REQUIRED = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def metadata(family="llama", **fields):
    """What is read of the required fields and of these, whose dots are two underscores."""
    own = REQUIRED | {name.replace("__", "."): value for name, value in fields.items()}
    return read_metadata({f"{family}.{key}": value for key, value in own.items()}, family)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 4.0, "rope__scaling__type": "linear"},
        {"rope__scale_linear": 4.0},
    ],
    ids=str,
)
def test_a_factor_is_linear_with_and_without_a_type(family, fields):
    scaling = metadata(family, **fields)["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}


def test_a_linear_factor_divides_the_frequencies_of_the_model(tmp_path):
    rotary = []
    for fields in ([], [("llama.rope.scaling.factor", 4)]):
        write(tmp_path / "tiny.gguf", fields=fields)
        config = AutoConfig.for_model(**open_checkpoint(tmp_path / "tiny.gguf").config)
        rotary.append(AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq)
    torch.testing.assert_close(rotary[1] * 4, rotary[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"rope__scaling__type": "none", "rope__scaling__factor": 4.0},
        {"rope__scaling__type": "linear"},
        {"rope__scaling__factor": 1.0, "rope__scaling__finetuned": True},
        {"logit_scale": 1.0, "residual_scale": 0.0, "final_logit_softcapping": 0.0},
        {"attention__clamp_kqv": 0.0, "expert_count": 0, "attention__causal": True},
        {"attention__sliding_window": 0},
        {"attention__sliding_window": 128},
        {"rope__scaling__original_context_length": 64},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_read(fields):
    assert metadata(**fields) == {"rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope.scaling.type", "dynamic"),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.factor", -1.0),
        ("rope.scaling.factor", float("nan")),
        ("rope.scaling.attn_factor", 1.19),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("rope.dimension_sections", None),
        ("logit_scale", 0.0625),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("attention.sliding_window", 64),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("expert_used_count", 2),
        ("expert_weights_scale", 2.5),
        ("nextn_predict_layers", 1),
        ("pooling_type", 3),
        ("a_field_of_next_year", 1),
        ("block_count", None),
        ("context_length", 0),
        ("embedding_length", -64),
        ("attention.head_count", "4"),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("feed_forward_length", None),
    ],
)
def test_fields_that_change_the_mathematics_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"llama\.{name}: expected"):
        metadata(**{name: value})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_field_that_is_missing_is_not_guessed(name):
    fields = {f"llama.{key}": value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(ValueError, match=rf"llama\.{name}: expected a number for all layers"):
        read_metadata(fields, "llama")


@pytest.mark.parametrize(
    ("key", "value"), [("attention.scale", 1), ("attention.value_length", 8), ("logit_scale", 16)]
)
def test_a_file_names_the_field_and_itself(tmp_path, key, value):
    write(tmp_path / "tiny.gguf", fields=[(f"llama.{key}", value)])
    with pytest.raises(CheckpointError, match=rf"tiny.gguf: llama\.{key}: expected .*got {value}"):
        open_checkpoint(tmp_path / "tiny.gguf")


def behind(data, name):
    """Where the bytes behind a name in a file begin."""
    entry = struct.pack("<Q", len(name)) + name.encode()
    return data.index(entry) + len(entry)


def moved(name, offset):
    def change(data):
        struct.pack_into("<Q", data, behind(data, name) + 4 + 2 * 8 + 4, offset)

    return change


def renamed(name, other):
    def change(data):
        at = behind(data, name)
        data[at - len(name) : at] = other.encode()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moved("blk.0.attn_q.weight", 0), r"expected bytes of its own, got some of '\w+"),
        (moved("blk.0.attn_v.weight", 64), r"expected bytes of its own, got some of '\w+"),
        (moved("blk.0.attn_q.weight", 3), r"'blk.0.attn_q.weight': expected an offset that is"),
        (moved("blk.0.attn_q.weight", 1 << 40), r"'blk.0.attn_q.weight': expected once, and bytes"),
        (renamed("blk.0.attn_k.weight", "blk.0.attn_v.weight"), r"'blk.0.attn_v.weight': expected"),
        (renamed("llama.context_length", "general.architecture"), r"architecture: expected one fi"),
    ],
    ids=["shared", "overlapping", "unaligned", "beyond", "tensor twice", "field twice"],
)
def test_a_header_that_contradicts_itself(tmp_path, change, words):
    write(tmp_path / "tiny.gguf", kind="F16")
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    change(data)
    (tmp_path / "tiny.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tiny.gguf: .*{words}"):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_rotary_frequencies_of_another_width(tmp_path):
    extra = [("rope_freqs.weight", np.ones(3, np.float32))]
    write(tmp_path / "tiny.gguf", kind="F16", extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight: expected 8 numbers.*got \[3\]"):
        open_checkpoint(tmp_path / "tiny.gguf")


def config_of(family, layers, shapes=(), **fields):
    """The config of a file of tensors without data."""
    own = REQUIRED | {"block_count": layers} | fields
    if "attention.layer_norm_epsilon" in own:
        del own["attention.layer_norm_rms_epsilon"]
    fields = {f"{family}.{key}": value for key, value in own.items()}
    shapes = {f"blk.{i}.ffn_norm.weight": (64,) for i in range(layers)} | dict(shapes)
    tensors = {
        name: GGUFTensor(Path("x.gguf"), TYPES[0], shape, 0, 4)
        for name, shape in {"token_embd.weight": (96, 64), **shapes}.items()
    }
    return read_config(Path("x.gguf"), GGUFHeader(fields, tensors, []), family, {})


FOUR = {"expert_count": 4, "expert_used_count": 2}
LINEAR = {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2}
LINEAR |= {"ssm.time_step_rank": 4, "ssm.inner_size": 64, "full_attention_interval": 4}


@pytest.mark.parametrize(("family", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_attention_of_the_largest_gemma_is_scaled_by_its_hidden_size(family, largest):
    fields = {"attention.key_length": 32, "attention.sliding_window": 16}
    assert config_of(family, 2, **fields)["query_pre_attn_scalar"] == 32
    assert config_of(family, largest, **fields)["query_pre_attn_scalar"] == 64 // 4
    scaled = config_of(family, 2, **fields, **{"attention.scale": 24**-0.5})
    assert scaled["query_pre_attn_scalar"] == 24


def test_gemma_3_has_other_rotary_frequencies_in_local_layers():
    fields = {"attention.sliding_window": 16, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0}
    config = AutoConfig.for_model(**config_of("gemma3", 6, **fields))
    assert config.rope_parameters["full_attention"] == {
        "rope_theta": 1e6,
        "rope_type": "linear",
        "factor": 8.0,
    }
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    with pytest.raises(
        CheckpointError, match=r"x.gguf: gemma3.*sliding_window_pattern: expected 6"
    ):
        config_of("gemma3", 2, **fields, **{"attention.sliding_window_pattern": 4})


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("gemma2", {}, "sliding_window: expected an integer of 1"),
        ("phi3", {"rope.scaling.type": "longrope"}, "expected longrope with rope_factors_long"),
        ("phi3", {"rope.scaling.attn_factor": 1.19}, "attn_factor: expected 1 without"),
        (
            "stablelm",
            {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True},
            "False",
        ),
        ("qwen3moe", {"expert_count": 4}, "expert_used_count: expected a number"),
        ("qwen3moe", {"expert_count": 4, "expert_used_count": 2}, "ffn_gate_exps.weight: expected"),
        (
            "gpt-oss",
            FOUR | {"attention.sliding_window_pattern": 3},
            "sliding_window_pattern: expected 2",
        ),
        ("minimax-m2", FOUR | {"expert_gating_func": 1}, "expert_gating_func: expected 2, got 1"),
        ("llama", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor: expected 1, got 0.5"),
        ("qwen35", LINEAR | {"ssm.time_step_rank": 3}, "time_step_rank: expected a multiple of 2"),
        ("qwen35", LINEAR | {"ssm.inner_size": 65}, "inner_size: expected a multiple of 4"),
        ("lfm2", {"shortconv.l_cache": 3}, "attn_k.weight: expected a multiple of 16 rows"),
        ("qwen35", LINEAR | {"ssm.conv_kernel": 0}, "conv_kernel: expected an integer of 1"),
        (
            "llama",
            {"expert_count": 4, "expert_used_count": 5},
            "expert_used_count: expected 1 to 4",
        ),
        ("qwen2", {"expert_count": 4}, "qwen2.expert_count: expected 0, got 4"),
        ("llama", {"attention.key_length": -4}, "key_length: expected an integer of 1"),
    ],
)
def test_fields_of_a_family_are_checked(family, fields, words):
    with pytest.raises(CheckpointError, match=rf"x.gguf: .*{words}"):
        config_of(family, 2, **fields)
