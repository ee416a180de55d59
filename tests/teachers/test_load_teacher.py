"""Teachers come from safe files, plain or quantised, and what cannot be loaded says why."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdistill import load_teacher
from fastdistill.hf.checkpoint import StoredModel
from fastdistill.hf.tokenizers import check_same_tokenizer, tokenizer_fingerprint
from fastdistill.quant import quantize_model, save_quantized
from fastdistill.teachers.local import Teacher
from helpers.families import build
from helpers.present import present
from helpers.training import VOCAB, llama

IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))


def tokenizer(words):
    vocab = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=words[0])


WORDS = [f"w{i}" for i in range(VOCAB)]


def test_from_a_path_with_its_tokenizer(tmp_path):
    model = llama(7, scale=20.0)
    model.save_pretrained(tmp_path)
    assert Teacher(tmp_path).tokenizer is None
    tokenizer(WORDS).save_pretrained(tmp_path)
    teacher = Teacher(tmp_path)
    assert tokenizer_fingerprint(teacher.tokenizer) == tokenizer_fingerprint(tokenizer(WORDS))
    assert torch.equal(teacher.topk(IDS, k=3).ids, Teacher(model).topk(IDS, k=3).ids)


@pytest.fixture
def pickled(tmp_path):
    """A model whose weights are a pickle."""
    model = llama(7)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pickled_weights_are_not_loaded(pickled):
    with pytest.raises(ValueError, match=r"safetensors.*a pickle can run code"):
        Teacher(pickled)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"teacher: expected a causal language model, or the path"):
        Teacher(3)
    with pytest.raises(TypeError, match=r"tokenizer: expected an object with get_vocab"):
        tokenizer_fingerprint("gpt2")


def test_fingerprint_is_the_map_and_not_the_roles():
    base, chat = tokenizer(WORDS), tokenizer(WORDS)
    chat.eos_token, chat.pad_token = WORDS[5], WORDS[5]
    check_same_tokenizer(base, chat)
    longer = tokenizer([*WORDS, "extra"])
    with pytest.raises(ValueError, match=r"1 tokens have another id \(first: 'extra' is None"):
        check_same_tokenizer(base, longer)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model and where it lies, with its tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    model = build("llama")
    model.save_pretrained(path)
    tokenizer(WORDS).save_pretrained(path)
    return model, path


def same_answers(a, b):
    left, right = a.topk(IDS, k=4), b.topk(IDS, k=4)
    assert torch.equal(left.ids, right.ids)
    torch.testing.assert_close(left.logprobs, right.logprobs)


def test_full_precision_from_a_path(stored):
    model, path = stored
    for name in (path, str(path)):
        teacher = load_teacher(name, tokens_per_batch=64, impl="torch")
        same_answers(teacher, Teacher(model))
        assert tokenizer_fingerprint(teacher.tokenizer) == tokenizer_fingerprint(tokenizer(WORDS))
        assert (teacher.reader.budget, teacher.impl, teacher.quant) == (64, "torch", None)
    assert not hasattr(teacher.model, "hf_device_map")  # the trainer may move it
    assert load_teacher(path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    eager = load_teacher(path, attn_implementation="eager")
    config: Any = eager.model.config
    assert config._attn_implementation == "eager"
    same_answers(eager, Teacher(model))


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int4", "int8"])
def test_quantised_while_loading_is_quantised_in_memory(stored, quant):
    model, path = stored
    from_path = load_teacher(path, quant=quant, compute="exact")
    in_memory = load_teacher(build("llama"), quant=quant, compute="exact")
    same_answers(from_path, in_memory)
    assert from_path.quant == in_memory.quant == quant
    assert from_path.source == StoredModel(path)
    assert in_memory.source is None
    difference = from_path.topk(IDS, k=VOCAB).logprobs - Teacher(model).topk(IDS, k=VOCAB).logprobs
    assert difference.abs().max() > 1e-4, "it was not quantised"
    assert from_path.head.weight.dtype == torch.float32, "the head keeps its type"


def test_a_checkpoint_that_is_quantised_already(tmp_path):
    model = quantize_model(build("llama"), "nf4", compute="exact")
    save_quantized(model, tmp_path)
    teacher = load_teacher(tmp_path, compute="exact")
    same_answers(teacher, Teacher(model))
    assert teacher.quant is None
    assert present(teacher.source).is_quantized
    with pytest.raises(ValueError, match=r"quant: expected None, since .* is quantized already"):
        load_teacher(tmp_path, quant="int8")


def test_a_name_is_fetched_without_code_or_pickles(stored, monkeypatch):
    requests = []

    def fetch(name, allow_patterns):
        requests.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("no route to host")
        return str(stored[1])

    monkeypatch.setattr("fastdistill.hf.checkpoint.snapshot_download", fetch)
    same_answers(load_teacher("someone/a-model", device="cpu"), Teacher(stored[0]))
    ((name, patterns),) = requests
    assert name == "someone/a-model"
    assert not any(fnmatch(f, p) for p in patterns for f in ("model.py", "pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing': there is no .*no route"):
        load_teacher("nobody/nothing")


def test_a_loaded_model_is_taken_as_it_is(stored):
    model = build("llama")
    teacher = load_teacher(model, device="cpu", attn_implementation="eager")
    assert teacher.model is model
    config: Any = model.config
    assert config._attn_implementation == "eager"
    same_answers(teacher, Teacher(stored[0]))


def test_what_cannot_be_a_teacher_is_refused(stored, tmp_path):
    path = stored[1]
    with pytest.raises(FileNotFoundError, match=r"owner/model\), got .*nowhere"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"path_or_model: expected a directory with config\.json"):
        load_teacher(tmp_path)
    with pytest.raises(TypeError, match="path_or_model: expected a causal language model, or the"):
        load_teacher(3)
    with pytest.raises(ValueError, match="quant: expected one of 'nf4', 'fp4', 'int4', 'int8'"):
        load_teacher(path, quant="q4")
    with pytest.raises(ValueError, match="compute: expected one of 'auto', 'exact', 'int8', 'fp8'"):
        load_teacher(path, quant="nf4", compute="fast")
    with pytest.raises(ValueError, match="compute: expected 'auto' for a teacher in full precis"):
        load_teacher(path, compute="int8")
    with pytest.raises(ValueError, match="dtype: expected 'auto' with a loaded model"):
        load_teacher(llama(7), dtype=torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"quant": "nf4"}])
def test_pickles_are_refused_by_name(pickled, options):
    with pytest.raises(ValueError, match=r"pytorch_model\.bin; a pickle can run code"):
        load_teacher(pickled, **options)


def test_code_beside_the_weights_is_not_run(tmp_path):
    llama(7).save_pretrained(tmp_path)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('this ran')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same_answers(load_teacher(tmp_path), Teacher(llama(7)))  # llama is transformers' own
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "x"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(tmp_path)


def test_flash_attention_is_chosen_where_it_runs(stored, monkeypatch):
    path, cuda = stored[1], torch.device("cuda")
    monkeypatch.setattr("fastdistill.hf.checkpoint.is_flash_attn_2_available", lambda: True)
    half = StoredModel(path, torch.bfloat16)
    assert half.attention_on(cuda) == "flash_attention_2"
    assert half.attention_on(torch.device("cpu")) is None
    assert StoredModel(path).attention_on(cuda) is None  # stored in fp32
    assert StoredModel(path, torch.bfloat16, "sdpa").attention_on(cuda) == "sdpa"
    monkeypatch.setattr("fastdistill.hf.checkpoint.is_flash_attn_2_available", lambda: False)
    assert half.attention_on(cuda) is None
