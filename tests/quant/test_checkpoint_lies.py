"""A checkpoint whose files are whole and do not mean what they say."""

import math
import os

import numpy as np
import pytest
import torch

from fastdistill import CacheError, load_teacher
from fastdistill.hf.checkpoint import load_whole
from fastdistill.hf.positions import row_limit
from fastdistill.quant import load_quantized, quantize_model, save_quantized
from fastdistill.quant.formats.checkpoint_gate import check_folder, load_tokenizer
from fastdistill.quant.formats.detect import open_checkpoint
from fastdistill.quant.formats.tensor_files import CheckpointError
from fastdistill.runtime.checks import fail
from helpers.gguf_writer import write
from helpers.present import present
from helpers.small_checkpoint import LOADERS, edit, edit_weights, logits, shard, small

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int64, torch.complex64]
)
def test_weights_that_are_no_floats_are_refused(folder, loader, dtype):
    edit_weights(folder, **{QUERY: torch.ones(32, 32).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"{QUERY}': expected floating point, got"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_of_any_precision_are_read(folder, dtype):
    weight = torch.ones(32, 32) / 64
    edit_weights(folder, **{QUERY: weight.to(dtype)})
    for load in (load_whole, lambda path: load_quantized(path)):
        assert torch.equal(load(folder).get_parameter(QUERY), weight)


@pytest.mark.parametrize("loader", ["load_teacher", "int8", "Subject"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_called_so(folder, loader, value):
    edit_weights(folder, **{QUERY: torch.full((32, 32), value)})
    with pytest.raises(ValueError, match=r"expected finite (values|logits|hidden states), got NaN"):
        LOADERS[loader](folder)


def test_a_method_that_is_not_the_tensors_is_refused(folder):
    for settings in ({"load_in_8bit": True}, {"quant_method": "gptq", "bits": 4}):
        edit(folder, "config.json", quantization_config=settings)
        with pytest.raises(CheckpointError, match=r"because config.json says so, got plain"):
            load_whole(folder)


@pytest.mark.parametrize("sizes", [{"vocab_size": 1 << 24}, {"intermediate_size": 1 << 24}])
def test_a_quantised_checkpoint_does_not_ask_for_more_than_it_holds(folder, tmp_path, sizes):
    save_quantized(quantize_model(load_whole(folder), "int8"), tmp_path / "own")
    edit(tmp_path / "own", "config.json", **sizes)
    with pytest.raises(CheckpointError, match=r"expected a configuration of the weights in [\d,]+"):
        load_quantized(tmp_path / "own")


def test_a_gguf_file_does_not_ask_for_more_than_it_holds(tmp_path):
    write(tmp_path / "tiny.gguf", kind="F16")
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    key = b"llama.feed_forward_length"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (1 << 24).to_bytes(4, "little")
    (tmp_path / "tiny.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected a configuration of the weights in [\d,]+"):
        load_quantized(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_a_gguf_file_that_is_cut_while_it_is_read(tmp_path, family):
    file = tmp_path / "tiny.gguf"
    write(file, family, "Q4_1", num_hidden_layers=1)
    weights = open_checkpoint(file).weights
    file.write_bytes(file.read_bytes()[:3000])
    read = weights["model.layers.0.self_attn.o_proj.weight"]
    words = rf"{file}: tensor 'blk.0.attn_output.weight': data: expected [\d,]+ bytes"
    with pytest.raises(CheckpointError, match=words):
        read()


UPS = ("blk.0.ffn_up_exps.weight", np.ones((4, 16, 64), np.float32))
DOWN = ("blk.0.ffn_down_exps.weight", np.ones((64, 96), np.float32))
FACTORS = [(f"rope_factors_{x}.weight", np.full(8, np.inf, np.float32)) for x in ("long", "short")]


@pytest.mark.parametrize(
    ("family", "made", "words"),
    [
        ("llama", {"fields": [("split.count", 1 << 30)]}, "split.count: expected at most 99999"),
        ("llama", {"fields": [("split.count", [2, 3])]}, "split.count: expected at most 99999"),
        (
            "llama",
            {"fields": [("split.count", 2)]},
            "a name that ends with -00001-of-00002",
        ),
        ("llama", {"fields": [("llama.rope.freq_base", 0)]}, "rope.freq_base: expected a finite"),
        ("llama", {"extra": [("blk.0.attn_q.weight", UPS[1])]}, "tensor 'blk.0.attn_q.weight'"),
        ("phi3", {"extra": FACTORS}, "rope_factors_long.weight: expected finite factors above 0"),
        ("qwen3moe", {"extra": [UPS]}, "expected ffn_gate_exps and ffn_up_exps of one shape"),
        (
            "qwen35",
            {"fields": [("qwen35.ssm.inner_size", 384)]},
            "ssm_conv1d.weight.: data: expected 448 rows",
        ),
        ("gpt-oss", {"extra": [DOWN]}, "tensor 'blk.0.ffn_down_exps.weight': "),
        ("qwen3moe", {"num_experts_per_tok": 5}, "expert_used_count: expected 1 to 4, got 5"),
        ("gemma3", {"fields": [("gemma3.rope.freq_base_swa", 0)]}, "base_swa: expected a finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gguf_file_that_lies(tmp_path, family, made, words):
    write(tmp_path / "tiny.gguf", family, "F16", **{"num_hidden_layers": 1} | made)
    with pytest.raises(CheckpointError, match=rf"tiny.gguf: .*{words}"):
        load_quantized(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "changes",
    [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}],
    ids=str,
)
def test_the_form_of_the_outputs_is_the_callers_choice(folder, loader, changes):
    edit(folder, "config.json", **changes)
    loaded = LOADERS[loader](folder)
    model = loaded if hasattr(loaded, "lm_head") else loaded.model
    true, actual = logits(small()), logits(model)
    assert (actual - true).abs().max() < (0.05 if loader == "int8" else 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1e308}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": math.inf}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_theta": -math.inf},
        {"max_position_embeddings": 10**400},
        {"a_field": [{"deep": -(10**30)}]},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_numbers_that_no_model_has_are_refused_by_name(folder, changes):
    edit(folder, "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"config.json: [^:]*: expected a number"):
        load_teacher(folder, device="cpu")


def test_a_scaling_without_end_is_no_limit():
    model = small(max_position_embeddings=64)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 1e308}
    assert present(row_limit("teacher", model)).tokens == 64


@pytest.mark.parametrize("loader", ["load_teacher", "int8"])
@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
    ids=["at opening", "at use"],
)
def test_a_panic_of_the_tokenizers_is_an_error_that_names_the_folder(folder, loader, parts):
    """They are no Exception: `except Exception` lets them pass."""
    edit(folder, "tokenizer.json", **parts)
    with pytest.raises(CheckpointError, match=rf"{folder}: expected a tokenizer that .*Panic"):
        LOADERS[loader](folder)


def test_a_tokenizer_that_cannot_be_used_is_refused_at_opening(folder):
    edit(folder, "tokenizer_config.json", model_max_length="long")
    with pytest.raises(CheckpointError, match=r"expected a tokenizer that can read and write"):
        load_tokenizer(folder)


def test_names_of_files_do_not_act_on_a_terminal(folder, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    os.symlink(tmp_path / "elsewhere", folder / "\x1b[2Jx.json")
    with pytest.raises(CheckpointError, match=r"\\x1b\[2Jx.json: expected a file of this") as one:
        check_folder(folder)
    (folder / "\x1b[2Jx.json").unlink()
    shard(folder, "\x1b[2Jx.safetensors")
    with pytest.raises(CheckpointError, match=r"expected this shard") as two:
        load_whole(folder)
    with pytest.raises(ValueError, match="expected") as three:
        fail("path", "a file", folder / "\x1b]0;title\x07")
    four = CacheError("\x9b2J: damaged")
    for error in (one.value, two.value, three.value, four):
        assert str(error).isprintable()
