"""Reading .gguf files: every weight as transformers expands it, or refused."""

import math
import shlex
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdistill import load_teacher
from fastdistill.quant import load_quantized, save_quantized
from fastdistill.quant.formats.detect import (
    CheckpointError,
    is_quantized_checkpoint,
    open_checkpoint,
)
from fastdistill.quant.formats.gguf_names import FAMILIES
from fastdistill.quant.formats.tensor_files import Expanded
from fastdistill.quant.loading import load_expanded
from fastdistill.quant.matrix import QuantizedMatrix
from fastdistill.quant.schemes import Int8Weight, Lut4Weight
from helpers.gguf_writer import blocks, config_of, part_of, write
from helpers.stored import read_all, values

ONE = np.ones((96, 64), np.float32)
LARGE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1)  # whole blocks of 256


@pytest.mark.fast_cases(2)
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    "family, kind, sizes",
    [
        ("llama", "Q4_0", {}),
        ("llama", "Q4_1", {}),
        ("qwen2", "Q8_0", {}),
        ("qwen3", "F16", {}),
        ("phi3", "BF16", {}),
        ("phi3", "Q5_0", {}),
        ("gemma2", "Q5_1", {}),
        ("gemma3", "Q4_K", LARGE | dict(head_dim=64)),
        ("stablelm", "Q6_K", LARGE),
        ("qwen2moe", "Q4_1", {}),
        ("qwen2moe", "Q5_1", {}),
        ("qwen3moe", "MXFP4", {}),
        ("qwen3moe", "Q8_0", {}),
        ("qwen35", "Q4_0", {}),
        ("lfm2", "Q4_0", {}),
        ("qwen35moe", "Q4_1", {}),
    ],
)
def test_equals_transformers(tmp_path, family, kind, sizes):
    write(tmp_path / "tiny.gguf", family, kind, **sizes)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.method == "gguf"
    config = AutoConfig.for_model(**checkpoint.config)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, config=config
    ).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(checkpoint.weights) == set(expected)
    for name, read in checkpoint.weights.items():
        weight = read()
        if isinstance(weight, Expanded):
            weight = weight.values
        weight = weight if isinstance(weight, torch.Tensor) else values(weight)
        assert torch.equal(weight.float().view(expected[name].shape), expected[name]), name


FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((family, {}, {}) for family in FAMILIES if family != "gemma3"),
    ("gemma3", {"num_hidden_layers": 6}, {}),  # the sixth is another
    ("stablelm", {"qk_layernorm": True}, {}),
    ("mixtral", {}, {}),
    ("mixtral", {}, {"single_experts": True}),
]


@pytest.mark.filterwarnings("ignore:model. . groups of experts are stored transposed:UserWarning")
@pytest.mark.fast_cases(11)
@pytest.mark.parametrize("family, sizes, how", FORMS)
def test_logits_are_those_of_the_converted_model(tmp_path, family, sizes, how):
    """Names, order of rows, norms and all entries of the config."""
    state = write(tmp_path / "tiny.gguf", family, "F32", **how, **sizes)
    original = AutoModelForCausalLM.from_config(config_of(family, **sizes)).eval()
    original.load_state_dict(state, strict=False)
    model = load_quantized(tmp_path / "tiny.gguf")
    ids = torch.arange(24)[None]  # more than the sliding window of Gemma
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path):
    """As in transformers, which has no module for them."""
    write(tmp_path / "tiny.gguf", "qwen35")
    expected = open_checkpoint(tmp_path / "tiny.gguf")
    fields = [("qwen35.block_count", 3), ("qwen35.nextn_predict_layers", 1)]
    write(tmp_path / "tiny.gguf", "qwen35", extra=[("blk.2.nextn.eh.weight", ONE)], fields=fields)
    read = open_checkpoint(tmp_path / "tiny.gguf")
    assert read.config == expected.config
    assert read.weights.keys() == expected.weights.keys()


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1"])
def test_experts_one_by_one_are_those_that_are_stacked(tmp_path, kind):
    """As in files before April 2024."""
    read = []
    for single in (True, False):
        write(tmp_path / "tiny.gguf", "mixtral", kind, single_experts=single)
        read.append(read_all(tmp_path / "tiny.gguf"))
    assert read[0].keys() == read[1].keys()
    for name, weight in read[1].items():
        a, b = (w.values if isinstance(w, Expanded) else w for w in (weight, read[0][name]))
        a, b = (w if isinstance(w, torch.Tensor) else values(w) for w in (a, b))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind, of", [("MXFP4", Lut4Weight), ("Q5_1", Expanded), ("F16", None)])
def test_experts_of_gpt_oss_are_in_the_order_of_its_safetensors(tmp_path, kind, of):
    """The rows of gate and up alternate; the values are those of gguf."""
    gguf = pytest.importorskip("gguf")
    state = write(tmp_path / "tiny.gguf", "gpt-oss", kind, num_hidden_layers=1)
    model = load_expanded(tmp_path / "tiny.gguf")
    weights = open_checkpoint(tmp_path / "tiny.gguf").weights
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        data = blocks(state[name].transpose(1, 2).contiguous(), kind)
        expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
        weight = weights[name]()
        assert isinstance(weight, of or torch.Tensor)
        if isinstance(weight, Lut4Weight):
            assert torch.equal(values(weight).view(expected.shape), expected)
        dense = model.get_parameter(name).transpose(1, 2).float()
        assert torch.equal(dense, expected), name


@pytest.mark.parametrize("kind, of", [("Q4_0", Lut4Weight), ("Q8_0", Int8Weight)])
def test_matrices_stay_quantized_and_norms_do_not(tmp_path, kind, of):
    state = write(tmp_path / "tiny.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path)  # the one .gguf file of a folder
    assert checkpoint.path == tmp_path / "tiny.gguf"
    assert is_quantized_checkpoint(tmp_path)
    assert is_quantized_checkpoint(tmp_path / "tiny.gguf")
    for name, read in checkpoint.weights.items():
        matrix = "norm" not in name
        weight = read()
        assert isinstance(weight, of if matrix else torch.Tensor), name
        assert tuple(weight.shape) == tuple(state[name].shape)
        if matrix:
            error = values(weight) - state[name]
            assert error.norm() < 0.15 * state[name].norm(), name


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_stay_packed_through_a_saved_folder(tmp_path, tied):
    write(tmp_path / "tiny.gguf", kind="Q8_0", head_kind="Q4_0", tie_word_embeddings=tied)
    ids = torch.arange(12)[None]
    loaded = load_quantized(tmp_path / "tiny.gguf", compute="exact")
    save_quantized(loaded, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", compute="exact")
    expected = load_expanded(tmp_path / "tiny.gguf")
    for model in (loaded, again):
        ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert all(isinstance(weight, QuantizedMatrix) for weight in ends)
        assert (ends[0] is ends[1]) == tied
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    teacher = load_teacher(tmp_path / "saved", compute="exact", device="cpu")
    assert teacher.fidelity({"input_ids": ids}, against=expected).kl < 1e-6


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


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_yarn(tmp_path, family):
    scaling = {"type": "yarn", "factor": 4, "original_context_length": 32}
    fields = [(f"{family}.rope.scaling.{key}", value) for key, value in scaling.items()]
    state = write(tmp_path / "tiny.gguf", family, "F32", fields=fields)
    config = config_of(family)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config.rope_parameters = {"rope_theta": 500000.0, **rope}
    original = AutoModelForCausalLM.from_config(config).eval()
    original.load_state_dict(state, strict=False)
    plain = AutoModelForCausalLM.from_config(config_of(family)).eval()
    plain.load_state_dict(state, strict=False)
    model, ids = load_quantized(tmp_path / "tiny.gguf"), torch.arange(90)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
        assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "made, words",
    [
        (dict(architecture="falcon"), r"architecture: expected one of .*'llama'.*got 'falcon'"),
        (dict(extra=[("blk.0.ffn_gate_exps.weight", np.ones((2, 32), np.float32))]), "gate_exps"),
        (dict(extra=[("blk.0.ffn_gate.0.weight", np.ones((2, 32), np.float32))]), "gate.0.weight"),
        (
            dict(family="mixtral", single_experts=True, extra=[("blk.0.ffn_up.7.weight", ONE)]),
            "0: expected ffn_gate.N.weight and ffn_up.N.weight of each expert.* got 9 tensors",
        ),
        (dict(extra=[("blk.0.attn_q.bias", np.ones(64, np.float32))]), "attn_q.bias"),
        (dict(extra=[("rope_factors_long.weight", np.ones(8, np.float32))]), "rotary"),
        (dict(fields=[("llama.rope.dimension_count", 8)]), "dimensions of a head, got 8"),
        (dict(fields=[("llama.rope.scaling.type", "su")]), "type: expected one of .*none.*'su'"),
        (dict(extra=[("blk.7.attn_q.weight", np.ones((2, 32), np.float32))]), "expected 3.*got 2"),
        (dict(fields=[("llama.expert_count", 8)]), "expected a tensor of a mixtral model"),
        (dict(fields=[("split.count", 3)]), "one of 3.*gguf-split --merge"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, made, words):
    file = tmp_path / "tiny.gguf"
    write(file, **made)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_all(file)
    assert "tiny.gguf" in str(caught.value)


def test_the_tokenizer_is_that_of_the_file(tmp_path):
    """Not that of its folder, which may be of another model."""
    letters = [*"abcdefgh", "<s>", "ab"]
    tokenizer = {
        "model": "gpt2",
        "tokens": letters,
        "token_type": [1] * 8 + [3, 1],
        "merges": ["a b"],
        "bos_token_id": 8,
        "add_bos_token": True,
    }
    fields = [(f"tokenizer.ggml.{key}", value) for key, value in tokenizer.items()]
    fields += [("tokenizer.chat_template", "{{ messages[0].content }}")]
    write(tmp_path / "tiny.gguf", fields=fields)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    read = load_teacher(tmp_path / "tiny.gguf", device="cpu").tokenizer
    assert read("abc")["input_ids"] == [8, 9, 2]
    assert read.apply_chat_template([{"content": "abc"}], tokenize=False) == "abc"
    assert read.name_or_path == str(tmp_path / "tiny.gguf")
    fields[1] = ("tokenizer.ggml.tokens", letters[:4])  # without that of bos_token_id
    write(tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: expected a tokenizer .*tokenizer="):
        load_teacher(tmp_path / "tiny.gguf", device="cpu")


def test_a_file_without_a_tokenizer(tmp_path, monkeypatch):
    write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # it is not needed
    assert load_teacher(tmp_path / "tiny.gguf", device="cpu").tokenizer is None


def test_a_mixed_file_stays_quantized_where_it_can(tmp_path, caplog):
    """As Q4_K_M: other types for some matrices, and Q6_K for the head."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    mixed = {"ffn_down": "Q6_K", "attn_v": "Q5_K", "attn_k": "Q2_K", "attn_q": "Q3_K"}
    write(tmp_path / "tiny.gguf", kind="Q4_K", head_kind="Q6_K", kinds=mixed, **sizes)
    words = "1 weights .*v_proj.* are expanded to .*GGUF Q5_K exactly"
    with caplog.at_level("INFO", "fastdistill"), pytest.warns(UserWarning, match=words):
        model = load_quantized(tmp_path / "tiny.gguf")
    layer = model.model.layers[0]
    layers = {
        name: type(part).__name__ for name, part in layer.named_modules() if name.endswith("_proj")
    }
    assert layers == {
        "self_attn.q_proj": "LUT4Linear",
        "self_attn.k_proj": "LUT4Linear",
        "self_attn.v_proj": "Linear",
        "self_attn.o_proj": "LUT4Linear",
        "mlp.gate_proj": "LUT4Linear",
        "mlp.up_proj": "LUT4Linear",
        "mlp.down_proj": "Int8Linear",
    }
    assert model.lm_head.weight.dtype == torch.float32
    (record,) = [r for r in caplog.records if r.name == "fastdistill.quant.formats.gguf"]
    for words in ("4 × Q4_K in 4 or 8 bits", "1 × Q5_K as fp32", "MB of weights in all"):
        assert words in record.message


def test_parts_are_one_model(tmp_path):
    file = tmp_path / "tiny.gguf"
    write(file)
    write(file, parts=3)
    whole = read_all(file)
    for number in (0, 2):
        split = read_all(part_of(file, number, 3))
        assert split.keys() == whole.keys()
        for name, weight in whole.items():
            a, b = (w if isinstance(w, torch.Tensor) else values(w) for w in (weight, split[name]))
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda part: part(1).unlink(), r"00002-of-00002.gguf: expected this part.*download it"),
        (lambda part: part(1).write_bytes(part(0).read_bytes()), "split.no 1 and split.count 2"),
        (
            lambda part: part(1).write_bytes(
                part(1).read_bytes().replace(b"blk.1.attn_norm", b"blk.0.attn_norm")
            ),
            "00002-of-00002.gguf: tensor 'blk.0.attn_norm.weight': expected a tensor of one part",
        ),
        (lambda part: part(0).rename(part(0).with_name("x.gguf")), "00001-of-00002.gguf: expected"),
        (
            lambda part: part(1).write_bytes(part(1).read_bytes()[:-1]),
            "00002-of-00002.gguf: tensor .*expected once, and bytes",
        ),
    ],
    ids=["missing", "copied", "twice", "renamed", "truncated"],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, change, words):
    file = tmp_path / "tiny.gguf"
    write(file, kind="F16", parts=2)

    def part(number):
        return part_of(file, number, 2)

    change(part)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(next(path for path in (part(0), part(1)) if path.exists()))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_command_for_another_architecture_expands_the_file(tmp_path, monkeypatch):
    tokens = [*"abcdefgh", "<s>", "ab", *(f"t{i}" for i in range(86))]
    tokenizer = {"model": "gpt2", "tokens": tokens, "merges": ["a b"], "bos_token_id": 8}
    fields = [(f"tokenizer.ggml.{key}", value) for key, value in tokenizer.items()]
    state = write(tmp_path / "tiny.gguf", "nemotron", "F32", fields=fields)
    with pytest.raises(CheckpointError, match="use the model's safetensors") as caught:
        open_checkpoint(tmp_path / "tiny.gguf")
    _, _, code, *arguments = shlex.split(str(caught.value)[str(caught.value).index("python -c") :])
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    monkeypatch.chdir(tmp_path)
    exec(code)
    read = AutoModelForCausalLM.from_pretrained("expanded").state_dict()
    torch.testing.assert_close(dict(read), dict(state))  # norms were stored as w + 1
    assert AutoTokenizer.from_pretrained("expanded")("ab")["input_ids"] == [9]


HUB, SOURCE = "https://huggingface.co/", "general.source.url"


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            [(SOURCE, HUB + "a-b/c.d")],
            r"names \(general.source.url\): hf download a-b/c.d, and pass",
        ),
        (
            [("general.base_model.0.repo_url", HUB + "a/b")],
            r"0.repo_url, the base if the file is a fine-tune\): hf download a/b, and pass 'a/b'",
        ),
        ([], "which the file does not name: hf download OWNER/NAME"),
        ([(SOURCE, HUB + "a/b; id")], "which the file does not name"),  # no name of the hub
        ([(SOURCE, "https://example.com/a/b")], "which the file does not name"),
    ],
)
def test_a_refusal_names_the_checkpoint_that_the_file_names(tmp_path, fields, words):
    write(tmp_path / "tiny.gguf", architecture="deci", fields=fields)
    with pytest.raises(
        CheckpointError, match=rf"got 'deci'; use .* safetensors checkpoint.*{words}"
    ):
        open_checkpoint(tmp_path / "tiny.gguf")
    write(tmp_path / "tiny.gguf", fields=[*fields, ("llama.logit_scale", 16)])
    with pytest.raises(CheckpointError, match=rf"llama.logit_scale: expected 0 or 1.*{words}"):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("number, name", [(16, "IQ2_XXS"), (35, "TQ2_0"), (40, "NVFP4")])
def test_other_types_are_refused_with_a_command(tmp_path, number, name):
    write(tmp_path / "tiny.gguf", kind="F16")
    data = bytearray((tmp_path / "tiny.gguf").read_bytes())
    entry = b"blk.0.attn_q.weight"
    struct.pack_into("<I", data, data.index(entry) + len(entry) + 4 + 16, number)
    (tmp_path / "tiny.gguf").write_bytes(data)
    words = rf"tensor 'blk.0.attn_q.weight': expected .*Q4_K.*got {name}; .*llama-quantize"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_rotary_factors_of_phi3(tmp_path):
    long, short = np.linspace(1, 9, 8, dtype=np.float32), np.ones(8, np.float32)
    extra = [("rope_factors_long.weight", long), ("rope_factors_short.weight", short)]
    fields = [("phi3.rope.scaling.original_context_length", 32)]
    write(tmp_path / "tiny.gguf", "phi3", extra=extra, fields=fields)
    config = AutoConfig.for_model(**open_checkpoint(tmp_path / "tiny.gguf").config)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    plain = 500000.0 ** -(torch.arange(8) / 8)
    for length, factors in ((16, short), (64, long)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        torch.testing.assert_close(rotary.inv_freq, plain / torch.from_numpy(factors))
    assert rotary.attention_scaling == pytest.approx((1 + math.log(4) / math.log(32)) ** 0.5)
