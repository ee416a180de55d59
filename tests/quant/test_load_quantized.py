"""Loading tensor by tensor gives the model that loading whole and quantising gives; so does a round
trip through our own format; what does not fit is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, modeling_utils

import fastdistill as fd
from fastdistill.quant import CheckpointError, load_quantized, saving
from fastdistill.quant.experts import ExpertStack
from fastdistill.quant.schemes import SCHEMES
from helpers.quant_models import CONFIGS, SIZES, logits, model_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Every model of CONFIGS on disk, in full precision and several shards."""
    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        model_of(name).save_pretrained(root / name, max_shard_size="100KB")
    return {name: root / name for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_streamed_is_loaded_and_quantised(name, scheme, folders):
    expected = fd.quantize_model(model_of(name), scheme, compute="exact")
    actual = load_quantized(folders[name], quant=scheme, compute="exact")
    assert torch.equal(logits(actual), logits(expected))
    assert not any(p.requires_grad for p in actual.parameters())


def test_zero3_partitions_no_quantized_model(folders, monkeypatch):
    """Under DeepSpeed's ZeRO-3, transformers partitions every model that it creates."""
    expected = logits(load_quantized(folders["llama with biases"], quant="int8"))
    monkeypatch.setattr(modeling_utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what it would import for that
    assert torch.equal(logits(load_quantized(folders["llama with biases"], quant="int8")), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_scheme_the_weights_are_the_checkpoints(name, folders):
    assert torch.equal(logits(load_quantized(folders[name])), logits(model_of(name)))


def test_types(folders):
    half = load_quantized(folders["llama with biases"], quant="nf4", dtype=torch.bfloat16)
    layer = half.model.layers[0].self_attn.q_proj
    assert half.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    whole = AutoModelForCausalLM.from_pretrained(folders["llama with biases"], dtype=torch.bfloat16)
    assert torch.equal(logits(half), logits(fd.quantize_model(whole, "nf4")))


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("limit", [20_000, 1 << 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name, limit, tmp_path):
    for scheme in SCHEMES:
        model = fd.quantize_model(model_of(name), scheme, compute="exact")
        path = fd.save_quantized(model, tmp_path / scheme, max_shard_bytes=limit)
        assert (path / INDEX).is_file() == (limit < 1 << 30)
        assert torch.equal(logits(load_quantized(path, compute="exact")), logits(model))
        again = fd.save_quantized(load_quantized(path), tmp_path / "again" / scheme)
        assert torch.equal(logits(load_quantized(again, compute="exact")), logits(model))


def test_tied_head_is_stored_once(tmp_path):
    config = Gemma2Config(**SIZES, head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    fd.quantize_model(model, "nf4", compute="exact")
    fd.save_quantized(model, tmp_path / "q")
    names = load_file(tmp_path / "q" / "model.safetensors")
    assert "lm_head.weight" not in names
    actual = load_quantized(tmp_path / "q", compute="exact")
    assert torch.equal(logits(actual), logits(model))
    assert actual.lm_head.weight is actual.model.embed_tokens.weight


def test_experts_stay_in_one_stack(folders):
    model = load_quantized(folders["mixtral"], quant="int8")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, ExpertStack)
    assert experts.gate_up_proj.shape == (4 * 256, 64)


def test_nothing_is_written_over_and_nothing_half_is_left(tmp_path, monkeypatch):
    model = fd.quantize_model(model_of("llama"), "nf4")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="path: expected a new or empty folder"):
        fd.save_quantized(model, tmp_path / "there")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdistill.quant.saving.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        fd.save_quantized(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    with pytest.raises(ValueError, match="model: expected quantized layers"):
        fd.save_quantized(model_of("llama"), tmp_path / "new")


def test_a_folder_that_another_process_filled_meanwhile(tmp_path, monkeypatch):
    """Two processes that quantize to one folder: the second is told, and the first result stays."""
    model = fd.quantize_model(model_of("llama"), "nf4")

    def faster(*args, **kwargs):
        write(*args, **kwargs)
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").write_text("")

    write = saving._write_weights
    monkeypatch.setattr(saving, "_write_weights", faster)
    with pytest.raises(FileExistsError, match="path: expected a new or empty folder"):
        fd.save_quantized(model, tmp_path / "new")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["new", "new/theirs"]


def edited(folder: Path, to: Path, *, tensors=lambda t: t, config=lambda c: c) -> Path:
    """A copy of a checkpoint in one file, changed."""
    to.mkdir()
    stored: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
    save_file(tensors(stored), to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(
        json.dumps(config(json.loads((folder / "config.json").read_text())))
    )
    return to


NORM = "model.layers.1.input_layernorm.weight"
PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(tensors=lambda t: {k: v for k, v in t.items() if k != NORM}),
            f"1 missing, {NORM}",
        ),
        (
            dict(tensors=lambda t: t | {PROJ: t[PROJ][:-1].contiguous()}),
            rf"tensor '{PROJ}': expected the shape \[128, 64\] that config.json asks for, "
            r"got \[127, 64\]",
        ),
        (
            dict(tensors=lambda t: t | {PROJ: t[PROJ] * torch.nan}),
            f"tensor '{PROJ}': weight: .*finite",
        ),
        (dict(config=lambda c: c | {"model_type": "no-such-model"}), "'no-such-model'"),
        (dict(config=lambda c: c | {"quantization_config": {"quant_method": "hqq"}}), "hqq"),
    ],
)
def test_errors_name_file_and_tensor(change, message, folders, tmp_path):
    path = edited(folders["llama"], tmp_path / "edited", **change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_quantized(path, quant=None if "config" in change else "nf4")
    assert "edited" in str(error.value)
    assert "expected the shape" not in message or "model.safetensors: tensor" in str(error.value)


def test_an_expert_that_does_not_fit_the_others_is_an_error_with_a_name(folders, tmp_path):
    def shortened(stored):
        name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
        return stored | {name: stored[name][:-1].contiguous()}

    path = edited(folders["mixtral"], tmp_path / "edited", tensors=shortened)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .*experts.gate_up_proj"):
        load_quantized(path, quant="nf4")


def test_arguments(folders, tmp_path):
    with pytest.raises(ValueError, match=r"quant: expected one of .*'q3'"):
        load_quantized(folders["llama"], quant="q3")
    with pytest.raises(ValueError, match="compute: expected one of"):
        load_quantized(folders["llama"], compute="int5")
    saved = fd.save_quantized(fd.quantize_model(model_of("llama"), "nf4"), tmp_path / "q")
    with pytest.raises(ValueError, match=r"quant: expected None, since .*q is quantized already"):
        load_quantized(saved, quant="int8")


def test_nothing_of_a_checkpoint_is_executed(folders, tmp_path):
    marker = tmp_path / "ran"
    path = edited(
        folders["llama"],
        tmp_path / "code",
        config=lambda c: (
            c | {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}
        ),
    )
    (path / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass"
    )
    load_quantized(path, quant="nf4")
    assert not marker.exists()


PEAK = """
import sys, threading, time
from fastdistill.quant import load_quantized, loading
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))
before, seen, done = resident(), [], []
def watch():
    while not done:
        seen.append(resident())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_quantized(sys.argv[1], quant="nf4")
done.append(True)
watcher.join()
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6
print(max(seen) - before, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_near_the_quantised_size(tmp_path):
    config = LlamaConfig(
        **SIZES | dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in copy.copy(list(model.parameters())):
        p.data.uniform_(-0.1, 0.1)
    model.save_pretrained(tmp_path)
    full = sum(p.nbytes for p in model.parameters()) / 1e6
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    peak, size = map(float, ran.stdout.split())
    assert size < 0.3 * full
    assert peak < size + 40  # MB: chunks in fp32, and what libraries take at first use
