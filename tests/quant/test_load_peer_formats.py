"""Whole models in the formats of other libraries load as the dense models of their values."""

import json
import warnings
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

from fastdistill.hf.checkpoint import StoredModel
from fastdistill.quant import (
    CheckpointError,
    is_quantized_checkpoint,
    load_quantized,
    save_quantized,
)
from fastdistill.quant.experts import ExpertStack
from fastdistill.quant.linear import Int8Linear, LUT4Linear
from fastdistill.quant.loading import load_shapes
from fastdistill.teachers.local import check_quantization
from fastdistill.training.plan.shapes import bytes_of
from helpers.peer_formats import fp8_blocks, integers, settings
from helpers.quant_models import SIZES, logits, model_of

PROJECTIONS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")


def write(root, model, make, config):
    """(a checkpoint with the projections of a model in another format, the one of their values).

    Args:
        make: (name, N, K) -> (tensors by the end of their name, their values), or None.
    """
    torch.manual_seed(1)
    model.save_pretrained(root / "dense")
    stored = load_file(root / "dense" / "model.safetensors")
    ours, dense = dict(stored), dict(stored)
    for name, weight in stored.items():
        made = make(name, *weight.shape) if name.endswith(PROJECTIONS) else None
        if made is not None:
            ours.pop(name)
            layer = name.removesuffix(".weight")
            ours |= {f"{layer}.{part}": tensor for part, tensor in made[0].items()}
            dense[name] = made[1].to(weight.dtype)
    (root / "ours").mkdir()
    save_file(dense, root / "dense" / "model.safetensors", {"format": "pt"})
    save_file(ours, root / "ours" / "model.safetensors", {"format": "pt"})
    own = json.loads((root / "dense" / "config.json").read_text())
    (root / "ours" / "config.json").write_text(json.dumps(own | {"quantization_config": config}))
    return root / "ours", root / "dense"


def load(path, **options):
    """(the model, the warnings of loading it)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: Any = load_quantized(path, compute="exact", **options)
    if is_quantized_checkpoint(path) and not options:
        assert bytes_of(load_shapes(path)) == bytes_of(model)  # as a plan counts it
    return model, " | ".join(str(warning.message) for warning in caught)


def int4(name, N, K):
    tensors, _, expected = integers(4, N, K, 32)
    return tensors, expected


INT4 = integers(4, 4, 32, 32)[1]


def test_mixed_groups_of_compressed_tensors(tmp_path):
    def make(name, N, K):
        if "v_proj" in name:
            return None  # ignored
        if "down_proj" not in name:
            return int4(name, N, K)
        tensors, _, expected = integers(8, N, K, -1, False, written="plain")
        activations = {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1).char()}
        return tensors | activations, expected

    w8 = integers(8, 4, 32, -1, False, written="plain")[1]
    config = settings(INT4, "mixed-precision", kv_cache_scheme={"num_bits": 8, "type": "float"})
    static = {"num_bits": 8, "type": "int"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": w8}
    config["config_groups"]["group_1"]["input_activations"] = static
    ours, dense = write(tmp_path, model_of("llama"), make, config)
    model, messages = load(ours)
    assert torch.equal(logits(model), logits(load(dense)[0]))
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.up_proj, LUT4Linear)
    assert type(layer.self_attn.v_proj) is type(layer.mlp.down_proj) is torch.nn.Linear
    assert "ours: input_activations are not quantized to int8 here" in messages
    assert "key-value cache is not quantized here" in messages
    assert "2 weights (model.layers.0.mlp.down_proj.weight, …) are expanded to float32" in messages
    assert "integers of 8 bits with zero points or act-order exactly: they take 0.1 MB" in messages


def test_a_head_of_its_own_is_read_and_saved_again(tmp_path):
    def make(name, N, K):
        tensors, _, expected = integers(8, N, K, 16)
        return tensors, expected

    config = settings(integers(8, 4, 32, 16)[1])
    model = model_of("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    ours, dense = write(tmp_path, model, make, config)
    loaded, messages = load(ours)
    assert messages == ""
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(loaded.model.layers[0].mlp.down_proj, Int8Linear)
    assert torch.equal(logits(loaded), logits(load(dense)[0]))
    again, _ = load(save_quantized(loaded, tmp_path / "again"))
    assert torch.equal(logits(again), logits(loaded))


def test_experts_keep_their_bits(tmp_path):
    ours, dense = write(tmp_path, model_of("mixtral"), int4, settings(INT4))
    model, messages = load(ours)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, ExpertStack)
    assert experts.gate_up_proj.block == 32
    assert messages == ""
    torch.testing.assert_close(logits(model), logits(load(dense)[0]), rtol=1e-5, atol=1e-5)


def test_experts_of_two_kinds_are_refused(tmp_path):
    def make(name, N, K):
        return None if "experts.2.w1" in name else int4(name, N, K)

    ours, _ = write(tmp_path, model_of("mixtral"), make, settings(INT4))
    with pytest.raises(ValueError, match=r"quant: expected None, since .* quantized already"):
        load_quantized(ours, quant="int8")
    with pytest.raises(ValueError, match=r"quant: expected None, since .* quantized already"):
        check_quantization(StoredModel.from_path(ours), "int8", "auto")
    with pytest.raises(CheckpointError, match=r"w1.weight': expected full precision, or quantized"):
        load_quantized(ours)


@pytest.mark.peers
@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4"])
def test_checkpoints_that_the_package_writes(tmp_path, preset):
    package = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = package.preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.strategy == "group":
        scheme.weights.group_size = 32
    config = package.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    model = model_of("llama").bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.apply_quantization_config(model, config)
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):  # of weights and activations
                parameter.data.fill_(1 / 128)
            elif name.endswith("zero_point") and not scheme.weights.symmetric:
                parameter.data.fill_(3)
        compressor = compressors.ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(tmp_path)
        compressor.update_config(tmp_path)
        ours, _ = load(tmp_path)
        compressor.decompress_model(model)
    projections = [name for name in model.state_dict() if name.endswith("_proj.weight")]
    assert len(projections) == 14
    for name in projections:
        layer = ours.get_submodule(name.removesuffix(".weight"))
        is_dense = isinstance(layer, torch.nn.Linear)
        dense = layer.weight if is_dense else layer.dequantize(torch.bfloat16)
        assert torch.equal(dense, model.state_dict()[name].to(torch.bfloat16)), name


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_fp8_in_blocks(tmp_path):
    def make(name, N, K):
        return fp8_blocks(N, K)

    ours, dense = write(tmp_path, model_of("qwen3 moe"), make, FP8)
    model, messages = load(ours)
    assert torch.equal(logits(model), logits(load(dense)[0]))
    assert (
        "are expanded to float32, because no quantized layer represents FP8 in blocks of 128"
        in messages
    )
    assert "MB; pass quant= to quantize them" in messages
    assert "activations are not quantized to FP8 here" in messages
    check_quantization(StoredModel.from_path(ours), "int8", "auto")
    quantized, messages = load(ours, quant="int8")
    assert torch.equal(logits(quantized), logits(load(dense, quant="int8")[0]))
    assert "expanded" not in messages
    assert isinstance(quantized.model.layers[0].mlp.experts.gate_up_proj, ExpertStack)


def test_gpt_oss(tmp_path):
    """The logits of transformers, which expands the experts."""
    config = GptOssConfig(
        **SIZES | {"hidden_size": 64, "intermediate_size": 96},
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        E, K, N = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(110, 122, (E, N, K // 32), dtype=torch.uint8)
    model.config.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    own["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (tmp_path / "config.json").write_text(json.dumps(own))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    expand = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **expand)
    loaded, messages = load(tmp_path, attn_implementation="eager")
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, ExpertStack)
    assert messages == ""
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"functional.linear.* if they are stored"):
        torch.nn.functional.linear(torch.ones(2, 64), cast(Any, experts.gate_up_proj[0]))
    again, _ = load(save_quantized(loaded, tmp_path / "again"), attn_implementation="eager")
    assert torch.equal(logits(again), logits(loaded))
