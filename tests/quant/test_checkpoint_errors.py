"""Whatever is wrong with a checkpoint is one CheckpointError that says where; damage neither
crashes nor allocates."""

import json
import pickle
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from fastdistill.quant.formats.detect import (
    CheckpointError,
    TensorFiles,
    is_quantized_checkpoint,
    open_checkpoint,
)
from fastdistill.quant.formats.tensor_files import Expanded
from helpers.gguf_writer import write as write_gguf
from helpers.peer_formats import fp4, fp8, fp8_blocks, integers, settings
from helpers.stored import golden, int4, nested_weight, read_all, store, store_own, values

W = "model.layers.0.mlp.up_proj.weight"
KINDS = (
    *("bitsandbytes", "gptq", "gptq of 8 bits", "awq", "compressed-tensors", "fp8", "mxfp4"),
    *("torchao", "fastdistill", "gguf of all types", "gguf of gpt-oss", "gguf of qwen35"),
)
# Of single experts: the rows of ffn_down are as long as a block of the K types.
TYPES = {f"ffn_down.{i}": kind for i, kind in enumerate(("Q2_K", "Q3_K", "Q4_K", "Q6_K"))}
TYPES |= {"ffn_gate.0": "Q5_0", "ffn_gate.1": "Q5_1", "ffn_gate.2": "Q8_0", "ffn_up.0": "MXFP4"}
TYPES |= {"ffn_up.1": "Q4_1", "attn_q": "F16", "attn_k": "BF16"}


def checkpoint_of(kind, folder):
    """(the checkpoint, the file of it to damage)"""
    folder.mkdir()
    if kind in ("gguf of gpt-oss", "gguf of qwen35"):
        write_gguf(folder / "tiny.gguf", kind.split()[-1], "MXFP4", num_hidden_layers=1)
        return folder / "tiny.gguf", folder / "tiny.gguf"
    if kind == "gguf of all types":
        sizes = {"num_hidden_layers": 1, "intermediate_size": 256}
        options = {"single_experts": True, "kinds": TYPES, **sizes}
        write_gguf(folder / "tiny.gguf", "mixtral", "Q4_0", **options)
        return folder / "tiny.gguf", folder / "tiny.gguf"
    if kind == "fastdistill":
        nested = nested_weight(folder / "source")
        store_own(folder, {W: int4(perm=torch.randperm(32)), "lm_head.weight": nested})
    elif kind == "compressed-tensors":
        groups = [integers(4, 6, 32, 16, False), fp8(6, 9, "channel"), fp4(4, 16, "nvfp4")]
        groups += [fp4(2, 32, "mxfp4"), integers(8, 3, 8, 8, written="plain")]
        config = settings(None, "mixed-precision")
        config["config_groups"] = {str(i): {"weights": group[1]} for i, group in enumerate(groups)}
        parts = [
            (f"layers.{i}.{part}", t) for i, g in enumerate(groups) for part, t in g[0].items()
        ]
        store(folder, dict(parts), config)
    elif kind == "mxfp4":
        tensors = {
            "x_blocks": torch.ones(2, 2, 1, 16).byte(),
            "x_scales": torch.ones(2, 2, 1).byte(),
        }
        store(folder, tensors, {"quant_method": kind})
    elif kind == "fp8":
        tensors, _ = fp8_blocks(130, 9)
        named = {f"x.{part}": tensor for part, tensor in tensors.items()}
        store(folder, named, {"quant_method": kind, "weight_block_size": [128, 128]})
    elif kind == "torchao":
        store(folder, *torchao_tensors())
    elif kind == "gptq of 8 bits":
        parts8 = {"qweight": (8, 4), "qzeros": (2, 1)}
        tensors = {
            f"x.{part}": torch.full(shape, 0x7F7F7F7F, dtype=torch.int32)
            for part, shape in parts8.items()
        }
        tensors["x.scales"] = torch.ones(2, 4).half()
        store(folder, tensors, {"quant_method": "gptq", "bits": 8, "group_size": 16})
    elif kind == "bitsandbytes":
        tensors = golden("bitsandbytes")["nf4_nested"]["tensors"]
        store(folder, tensors, {"quant_method": kind, "load_in_4bit": True})
    else:
        tensors = golden("gptq_awq")["gptq_act_order" if kind == "gptq" else "awq"]["tensors"]
        store(folder, tensors, {"quant_method": kind, "bits": 4, "group_size": 32})
    return folder, folder / "model.safetensors"


def torchao_tensors():
    """(tensors of four types, config, metadata)"""
    layers = {
        "Int8Tensor": {"qdata": torch.ones(4, 8).char(), "zero_point": torch.ones(4, 2).char()},
        "Float8Tensor": {"qdata": torch.ones(4, 8).to(torch.float8_e4m3fn)},
        "Int4Tensor": {"qdata": torch.ones(4, 4).char(), "scale": torch.ones(2, 4)},
        "Int4TilePackedTo4dTensor": {
            "qdata": torch.ones(1, 1, 32, 4).int(),
            "scale_and_zero": torch.ones(2, 8, 2).bfloat16(),
        },
    }
    layers["Int4Tensor"]["zero_point"] = torch.ones(2, 4)
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    for kind, parts in layers.items():
        parts = parts if "scale_and_zero" in parts else {"scale": torch.ones(4, 2)} | parts
        tensors |= {f"{kind}._weight_{part}": tensor for part, tensor in parts.items()}
        data = {"block_size": [1, 4], "shape": [4, 8]}
        metadata[f"{kind}.weight"] = json.dumps({"_type": kind, "_data": data})
    return tensors, {"quant_method": "torchao", "quant_type": "int4"}, metadata


def survives(path):
    """Reads or raises CheckpointError, in little memory. Values may be wrong, the structure not."""
    message = str(path)
    tracemalloc.start()
    try:
        for weight in read_all(path).values():
            if not isinstance(weight, (torch.Tensor, Expanded)):
                values(weight)
    except CheckpointError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert str(path) in message
    assert peak < 64 << 20


@pytest.mark.fast_cases(11)
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere(tmp_path, kind):
    checkpoint, file = checkpoint_of(kind, tmp_path / "whole")
    data = file.read_bytes()
    for length in {*range(64), *range(64, len(data), max(1, len(data) // 60)), len(data) - 1}:
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=file.name):
            open_checkpoint(checkpoint)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit", [0x01, 0x80, 0xFF])
def test_flipped_anywhere_in_the_header(tmp_path, kind, bit):
    checkpoint, file = checkpoint_of(kind, tmp_path / "whole")
    data = file.read_bytes()
    header = 3000 if "gguf" in kind else 8 + int.from_bytes(data[:8], "little")
    for at in {*range(32), *range(32, header, max(1, header // 250))}:
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        survives(checkpoint)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gguf" not in kind])
def test_flipped_anywhere_in_the_config_or_the_values(tmp_path, kind):
    checkpoint, file = checkpoint_of(kind, tmp_path / "whole")
    for damaged in (checkpoint / "config.json", file):
        data = damaged.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 200)):
            damaged.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
            survives(checkpoint)
        damaged.write_bytes(data)


def edit_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def sharded(folder):
    folder.mkdir()
    files = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    for name, file in files.items():
        save_file({name: torch.arange(3.0)}, folder / file)
    edit_index(folder, files)
    return folder


def test_plain_files_and_shards(tmp_path):
    folder = sharded(tmp_path / "plain")
    files = TensorFiles(folder)
    assert files.names() == ["a", "b"]
    assert files.file_of("b").name == "model-2-of-2.safetensors"
    assert torch.equal(files.read("a"), torch.arange(3.0))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.method, checkpoint.config) == (None, {})
    assert list(checkpoint.weights) == ["a", "b"]
    assert not is_quantized_checkpoint(folder)
    assert not is_quantized_checkpoint("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_before_it_is_asked_for(tmp_path, kind, monkeypatch):
    checkpoint, _ = checkpoint_of(kind, tmp_path / "whole")

    def read(*arguments):
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as patched:
        patched.setattr(TensorFiles, "read", read)
        patched.setattr("numpy.fromfile", read)
        weights = open_checkpoint(checkpoint).weights
    assert all(read() is not None for read in weights.values())


@pytest.mark.parametrize(
    "damage, words",
    [
        (shutil.rmtree, "got nothing at this path"),
        (
            lambda f: (f / "model-2-of-2.safetensors").unlink(),
            "2-of-2.*tensor 'b', got no such file",
        ),
        (lambda f: edit_index(f, {"c": "model-1-of-2.safetensors"}), "'c'.*file without it"),
        (lambda f: edit_index(f, {"a": "../x.safetensors"}), "file in the same folder"),
        (lambda f: edit_index(f, {"a": "x" * 5000}), "tensor 'a': .*name too long"),
        (lambda f: edit_index(f, {"a": None}), "file in the same folder, got None"),
        (lambda f: edit_index(f, []), "expected a 'weight_map'"),
        (lambda f: edit_index(f, {"a": "x.pt"}), "no such file"),
        (lambda f: (f / "model-2-of-2.safetensors").write_bytes(b"\x80\x04."), "got a pickle"),
        (lambda f: (f / "model.safetensors.index.json").write_text("["), "JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 10**6), "JSON object"),
        (lambda f: (f / "config.json").write_text("3"), "expected a JSON object, got int"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "got neither"),
    ],
)
def test_folders_that_are_not_whole(tmp_path, damage, words):
    folder = sharded(tmp_path / "plain")
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "x.pt", "x.CKPT", "model.safetensors", "x.gguf"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened(tmp_path, name, zipped):
    if zipped:
        torch.save(Bomb(), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=r"got a pickle.*save_pretrained"):
            open_checkpoint(path)


def test_unknown_type_of_a_tensor(tmp_path):
    header = json.dumps({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match=r"model.safetensors.*Q9"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"quant_method": "hqq"}, r"expected one of .*'bitsandbytes'.*'awq'.*got 'hqq'"),
        ({"quant_method": "auto-round"}, "got 'auto-round'"),
        ({"quant_method": ["gptq"]}, r"got \['gptq'\]"),
        ({"bits": 4}, "got None"),
        (["gptq"], "expected an object, got list"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32},
            "tensors of gptq.*got bitsandbytes",
        ),
        ({"quant_method": "fastdistill", "version": 1}, "tensors of fastdistill.*got bitsandbytes"),
    ],
)
def test_methods_that_are_not_supported_or_do_not_agree(tmp_path, settings, words):
    folder = store(tmp_path, golden("bitsandbytes")["nf4"]["tensors"], settings)
    assert is_quantized_checkpoint(folder)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


def test_tensors_of_gptq_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a quantization_config.*quantize_config"):
        open_checkpoint(store(tmp_path, golden("gptq_awq")["gptq"]["tensors"]))
