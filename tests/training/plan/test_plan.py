"""plan_memory: what it takes and refuses, and what it counts without weights."""

import json
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from fastdistill.quant import quantize_model
from fastdistill.quant.schemes import SCHEMES
from fastdistill.training.plan import Settings, plan_memory
from fastdistill.training.plan import meta_memory as tracking
from fastdistill.training.plan.memory import Planner
from fastdistill.training.plan.optimisers import optimizer_memory
from fastdistill.training.plan.shapes import (
    bytes_of,
    config_of,
    empty_model,
    quantized_size,
    shapes_of,
)
from fastdistill.training.plan.sizes import read_bytes

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

NOT_SETTINGS = ("gpu", "device", "throughput")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    LlamaConfig(**SMALL).save_pretrained(folder / "small")
    LlamaConfig(**SMALL | {"vocab_size": 151936}).save_pretrained(folder / "teacher")
    return folder


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5GB", 15 * 10**8)]
)
def test_cards(text, count):
    assert read_bytes("gpu", text) == count
    assert read_bytes("gpu", count) == count


@pytest.mark.parametrize("text", ["24", "24gb", "24MB", "GB", "0GB", "-4GB", 0, True])
def test_no_cards(text):
    with pytest.raises(ValueError, match="gpu: expected bytes, or a number with GB"):
        read_bytes("gpu", text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq": 1}, "seq: expected an integer of 2 or more, got 1"),
        ({"batch": 0}, "batch: expected an integer of 1"),
        ({"k": 0}, "k: expected an integer of 1"),
        ({"k": None}, "k: expected a number of answers without a teacher"),
        ({"gpu": "24"}, "gpu: expected bytes"),
        ({"dtype": "int8"}, "dtype: expected one of 'bfloat16', 'float16', 'float32'"),
        ({"optim": "adafactor"}, "optim: expected one of 'adamw_torch_fused'"),
        ({"backward": "never"}, "backward: expected one of"),
        ({"device": "tpu"}, "device: expected one of 'cuda', 'cpu'"),
        ({"teacher_quant": "int8"}, "teacher_quant: expected a teacher with this option"),
        ({"cached": True}, "cached: expected a teacher with this option"),
        ({"support": "student"}, "support: expected a teacher with this option"),
        ({"support": "union", "cached": True}, "support: expected 'teacher' with cached"),
        ({"throughput": 0}, "throughput: expected a finite number above 0"),
        ({"lora_rank": 0}, "lora_rank: expected an integer of 1"),
    ],
)
def test_refusals(models, options, words):
    arguments = {name: value for name, value in options.items() if name in NOT_SETTINGS}
    options = {"seq": 8} | {name: v for name, v in options.items() if name not in NOT_SETTINGS}
    with pytest.raises(ValueError, match=words):
        plan_memory(models / "small", settings=Settings(**options), **arguments)


def test_an_unknown_scheme(models):
    small = models / "small"
    with pytest.raises(
        ValueError, match="teacher_quant: expected one of 'nf4', 'fp4', 'int4', 'int8'"
    ):
        plan_memory(small, small, settings=Settings(seq=8, teacher_quant="int3"))


def test_where_a_configuration_is_read_from(models, tmp_path):
    folder = plan_memory(models / "small", settings=Settings(seq=8))
    file = plan_memory(models / "small" / "config.json", settings=Settings(seq=8))
    assert folder.memory == file.memory
    with pytest.raises(ValueError, match="student: expected a directory with"):
        plan_memory(tmp_path, settings=Settings(seq=8))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="teacher: expected the configuration of a causal"):
        plan_memory(models / "small", tmp_path, settings=Settings(seq=8))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied):
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(config)
    shapes = shapes_of("", empty_model("student", config, torch.float32))
    assert shapes.total == sum(p.numel() for p in real.parameters())
    assert shapes.embeddings == 500 * 64
    assert shapes.head == (0 if tied else 500 * 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3MoeConfig])
def test_quantised_bytes_are_those_of_the_quantised_model(kind, scheme):
    experts = {"num_experts": 4, "moe_intermediate_size": 32} if kind is Qwen3MoeConfig else {}
    config = kind(**SMALL, **experts)
    size = quantized_size(empty_model("teacher", config, torch.float32), scheme)
    real = quantize_model(AutoModelForCausalLM.from_config(config), scheme, compute="exact")
    assert size.weights == bytes_of(real)


def test_optimisers_keep_what_they_say():
    p = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (5000, 100)]
    for q in p:
        q.grad = torch.zeros_like(q)
    optimiser = torch.optim.AdamW(p)
    optimiser.step()
    tensors = [t for s in optimiser.state.values() for t in s.values() if t.dim()]
    assert optimizer_memory("adamw_torch", p, "cpu").state == sum(t.nbytes for t in tensors)
    assert optimizer_memory("adamw_torch", p, "cuda").scratch == 2 * 5100
    assert optimizer_memory("adamw_8bit", p, "cuda").state == 2 * (5000 + 20 * 4 + 400)
    assert optimizer_memory("sgd", p, "cuda") == (0, 0)


def test_the_loss_takes_the_chunks_of_the_gpu(models):
    config = config_of("student", models / "small")
    planners = [Planner(config, None, device, 8 * 10**9) for device in ("cuda", "cpu")]
    shapes = [planner.head_shape(planner.student(None, None)) for planner in planners]
    assert [shape.gpu_memory for shape in shapes] == [8e9, math.inf]


def test_cache_and_time(models):
    plan = plan_memory(
        models / "small", models / "teacher", settings=Settings(seq=8), tokens=10**8, throughput=9e3
    )
    assert plan.cache_per_token == 267
    assert plan.cache == 267 * 10**8
    assert plan.seconds == pytest.approx(11111, rel=1e-3)
    untimed = plan_memory(models / "small", models / "teacher", settings=Settings(seq=8))
    assert untimed.cache is None
    assert untimed.seconds is None


# Of transformers 5.0's mixtures, in a process that was made deterministic for another test.
@pytest.mark.fast_cases(3)
@pytest.mark.filterwarnings("ignore:_histc_cuda:UserWarning")
@pytest.mark.parametrize("kind", [MixtralConfig, OPTConfig, Phi3Config, Qwen3MoeConfig])
def test_families(kind, tmp_path):
    sizes = SMALL | ({"ffn_dim": 96, "word_embed_proj_dim": 64} if kind is OPTConfig else {})
    if kind is OPTConfig:
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    kind(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    for batch in (1, 2):
        plan = plan_memory(
            tmp_path, tmp_path, settings=Settings(seq=64, batch=batch, gradient_checkpointing=True)
        )
        assert plan.activations["checkpointed"] < plan.activations["kept"]


def test_a_model_that_cannot_be_counted_is_named(models, monkeypatch):
    monkeypatch.setattr(tracking, "MOST_OPERATIONS", 20)
    with pytest.raises(ValueError, match="student: expected a model whose memory can be counted"):
        plan_memory(models / "small", settings=Settings(seq=8))


def test_code_beside_a_configuration_is_not_run(tmp_path):
    auto = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="student: expected"):
        plan_memory(tmp_path, settings=Settings(seq=8))
