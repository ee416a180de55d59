"""Reading bitsandbytes checkpoints: every bit as bitsandbytes itself expands them.

golden/bitsandbytes.json holds bytes that bitsandbytes 0.50.2 wrote, so that this runs without it;
`python tests/quant/test_read_bitsandbytes.py`, where it is installed, writes them again.
"""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from fastdistill.quant.formats.detect import (
    CheckpointError,
    is_quantized_checkpoint,
    open_checkpoint,
)
from fastdistill.quant.schemes import Int8Weight, Lut4Weight, Nested, unpack_nibbles
from helpers.stored import DTYPES, assert_planned, golden, store, values, write_golden

SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
LAYER = "model.layers.0.self_attn.q_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def stored_by_bitsandbytes(shape, kind="nf4", block=64, nested=False, dtype=torch.bfloat16, seed=0):
    """(tensors of the checkpoint, the 4-bit state behind them) of a random layer."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(seed)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    weight.view(-1)[: min(block, weight.numel() // 2)] = 0
    packed, state = functional.quantize_4bit(
        weight, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    parts = {f"{LAYER}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {f"{LAYER}.weight": packed, **parts}, (packed, state)


def flat_blocks(packed, state, dtype):
    """bitsandbytes' definition, block by block of the flattened tensor. Its own AVX512 code walks
    rows instead, which is wrong where blocks cross them (0.50.2)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    count = state.shape.numel()
    codes = state.code[unpack_nibbles(packed.reshape(-1), count).long()]
    scale = absmax.repeat_interleave(state.blocksize)[:count]
    return (codes * scale).view(state.shape).to(dtype)


def read(folder, tensors, settings=SETTINGS):
    weight: Any = open_checkpoint(store(folder, tensors, settings)).weights[f"{LAYER}.weight"]()
    assert_planned(folder, f"{LAYER}.weight", weight)
    return weight


@pytest.mark.parametrize("case", ["nf4", "nf4_nested", "fp4", "nf4_across_rows", "int8"])
def test_golden_bytes(tmp_path, case):
    held = golden("bitsandbytes")[case]
    weight = read(tmp_path, held["tensors"])
    for dtype, expected in held["values"].items():
        assert torch.equal(values(weight, getattr(torch, dtype)), expected)
    assert isinstance(weight, Int8Weight if case == "int8" else Lut4Weight)
    assert isinstance(getattr(weight, "scale", None), Nested) == (case == "nf4_nested")


@pytest.mark.peers
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_equals_bitsandbytes(tmp_path, kind, block, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors, (packed, state) = stored_by_bitsandbytes((96, 1024), kind, block, nested)
    weight = read(tmp_path, tensors)
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(values(weight, dtype), functional.dequantize_4bit(packed, state))
        assert torch.equal(values(weight, dtype), flat_blocks(packed, state, dtype))


@pytest.mark.peers
@pytest.mark.parametrize("shape", [(7, 100), (33, 36), (5, 2), (3, 5), (64, 65)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_cross_rows(tmp_path, shape, nested):
    tensors, (packed, state) = stored_by_bitsandbytes(shape, nested=nested)
    weight = read(tmp_path, tensors)
    for dtype in DTYPES:
        assert torch.equal(values(weight, dtype), flat_blocks(packed, state, dtype))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_stored_under_another_type(tmp_path, storage):
    tensors = golden("bitsandbytes")["nf4"]["tensors"]
    expected = values(read(tmp_path / "u8", tensors))
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].view(-1).view(storage).view(-1, 1)
    assert torch.equal(values(read(tmp_path / "other", tensors)), expected)


@pytest.mark.peers
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_saved_before_and_after_it_was_used(tmp_path, nested):
    """On some CPUs one eval forward repacks the weight; state_dict undoes that, but its absmax went
    through bf16, in bitsandbytes as in what is read."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        256,
        64,
        bias=True,
        compute_dtype=torch.bfloat16,
        compress_statistics=nested,
        quant_type="nf4",
    ).to("cpu")
    for used in (False, True):
        if used:
            with torch.no_grad():
                layer.eval()(torch.randn(2, 256).bfloat16())
        tensors = {f"{LAYER}.{k}": v.contiguous() for k, v in layer.state_dict().items()}
        weight = read(tmp_path / str(used), tensors)
        state = layer.weight.quant_state
        assert torch.equal(values(weight), flat_blocks(layer.weight.data, state, torch.float32))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # transformers' and bitsandbytes' own
@pytest.mark.parametrize(
    "settings",
    [
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16),
        dict(load_in_8bit=True),
    ],
)
def test_a_model_that_transformers_saved_in_shards(tmp_path, settings):
    functional = pytest.importorskip("bitsandbytes.functional")
    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=1, vocab_size=96)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "small", max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path / "small")
    assert set(checkpoint.weights) == {name for name, _ in model.named_parameters()}
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    for name, theirs in model.named_parameters():
        ours: Any = checkpoint.weights[name]()
        if isinstance(ours, Int8Weight):
            ours, theirs = ours.qdata, theirs.data
        elif isinstance(ours, Lut4Weight):
            ours = values(ours, torch.bfloat16)
            theirs = functional.dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(ours, theirs), name


def test_only_weights_are_named_and_others_come_as_stored(tmp_path):
    held = golden("bitsandbytes")["nf4_nested"]["tensors"]
    bias, norm = torch.randn(4), torch.randn(6, dtype=torch.bfloat16)
    store(tmp_path, held | {f"{LAYER}.bias": bias, "model.norm.weight": norm}, SETTINGS)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.method == "bitsandbytes"
    assert checkpoint.config["quantization_config"] == SETTINGS
    assert set(checkpoint.weights) == {f"{LAYER}.weight", f"{LAYER}.bias", "model.norm.weight"}
    for name, stored in ((f"{LAYER}.bias", bias), ("model.norm.weight", norm)):
        tensor = checkpoint.weights[name]()
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, stored)
    assert is_quantized_checkpoint(tmp_path)


def test_eight_bits_scale(tmp_path):
    q = torch.randint(-127, 128, (6, 10), dtype=torch.int8)
    top = torch.rand(6)
    tensors = {
        f"{LAYER}.weight": q,
        f"{LAYER}.SCB": top,
        f"{LAYER}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    settings = {"load_in_8bit": True}  # as written before transformers named the method
    checkpoint = open_checkpoint(store(tmp_path, tensors, settings))
    assert list(checkpoint.weights) == [f"{LAYER}.weight"]
    weight = checkpoint.weights[f"{LAYER}.weight"]()
    assert isinstance(weight, Int8Weight)
    assert torch.equal(weight.qdata, q)
    assert isinstance(weight.scale, torch.Tensor)
    assert torch.equal(weight.scale, top / 127)
    tensors[f"{LAYER}.weight_format"] += 1
    with pytest.raises(CheckpointError, match=r"weight_format.*rows one after the other"):
        read(tmp_path / "tiled", tensors, settings)


def changed(state, **values):
    stored = json.loads(bytes(state.tolist())) | values
    stored = {k: v for k, v in stored.items() if v is not None}
    return torch.tensor(list(json.dumps(stored).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(shape=[4, 62]), "qdata: expected 124 values"),
        (dict(shape=[4, -64]), "two positive integers"),
        (dict(shape=[256]), "two positive integers"),
        (dict(shape="4x64"), "two positive integers"),
        (dict(shape=None), "expected an entry 'shape'"),
        (dict(blocksize=0), "blocksize: expected 1 to .*, got 0"),
        (dict(blocksize=-64), "blocksize: expected 1 to .*, got -64"),
        (dict(blocksize=32), "scale: expected"),
        (dict(blocksize=64.0), "blocksize: expected 1 to .*, got 64.0"),
        (dict(quant_type="fp4"), "quant_type: expected 'nf4', got 'fp4'"),
        (dict(nested_blocksize=256), "expected an entry 'nested_offset'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, wrong, words):
    tensors = golden("bitsandbytes")["nf4"]["tensors"]
    tensors[STATE] = changed(tensors[STATE], **wrong)
    with pytest.raises(CheckpointError, match=words) as caught:
        read(tmp_path, tensors)
    assert "model.safetensors" in str(caught.value)
    assert LAYER in str(caught.value)


@pytest.mark.parametrize(
    "part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_a_missing_part_is_named(tmp_path, part):
    tensors = golden("bitsandbytes")["nf4_nested"]["tensors"]
    del tensors[f"{LAYER}.weight{part}"]
    with pytest.raises(CheckpointError, match=f"q_proj.weight{part}'.*incomplete"):
        read(tmp_path, tensors)


def test_an_unknown_kind_is_refused(tmp_path):
    tensors = golden("bitsandbytes")["nf4"]["tensors"]
    tensors[STATE.replace("nf4", "af4")] = tensors.pop(STATE)
    with pytest.raises(CheckpointError, match=r"one of the 4-bit types.*'af4'"):
        read(tmp_path, tensors)


def _golden_cases():
    bnb = pytest.importorskip("bitsandbytes")
    for name, shape, kind, nested in (
        ("nf4", (4, 64), "nf4", False),
        ("nf4_nested", (12, 64), "nf4", True),
        ("fp4", (4, 64), "fp4", False),
        ("nf4_across_rows", (7, 20), "nf4", False),
    ):
        block = 32 if shape[0] == 7 else 64
        tensors, (packed, state) = stored_by_bitsandbytes(shape, kind, block, nested)
        expected = {str(d).removeprefix("torch."): flat_blocks(packed, state, d) for d in DTYPES}
        yield name, {"tensors": tensors, "values": expected}
    q, top, _ = bnb.functional.int8_vectorwise_quant(torch.randn(4, 16).half())
    tensors = {f"{LAYER}.weight": q, f"{LAYER}.SCB": top}
    yield "int8", {"tensors": tensors, "values": {"float32": q * (top / 127)[:, None]}}


if __name__ == "__main__":
    write_golden("bitsandbytes", "bitsandbytes 0.50.2, torch 2.13.0, x86", dict(_golden_cases()))
