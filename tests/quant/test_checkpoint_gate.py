"""One gate for every checkpoint: nothing leads out of its folder, nothing in it chooses code, and
what is damaged is an error that names it."""

import json
import math
import os
import shutil
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastdistill import load_teacher
from fastdistill.alignment.organisms.vocabulary import WORDS, world_tokenizer
from fastdistill.hf.checkpoint import load_whole
from fastdistill.quant.formats.checkpoint_gate import (
    check_choices,
    check_folder,
    load_config,
    load_tokenizer,
)
from fastdistill.quant.formats.tensor_files import CheckpointError
from helpers.small_checkpoint import INDEX, LOADERS, edit, edit_weights, shard


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("place", ["../secret/s.safetensors", "absolute", "pickled.bin", "link"])
def test_an_index_does_not_lead_out_of_the_folder_or_to_a_pickle(folder, tmp_path, loader, place):
    secret = tmp_path / "secret" / "s.safetensors"
    secret.parent.mkdir()
    weights = shard(folder, {"absolute": secret, "link": "l.safetensors"}.get(place, place))
    save_file(weights, secret, {"format": "pt"})
    torch.save(weights, folder / "pickled.bin")
    (folder / "l.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"same folder|got a pickle|got a link to"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file of this folder, got a lin"):
        load_teacher(folder, device="cpu")


def test_the_cache_of_the_hub_is_read(folder, tmp_path):
    """snapshots/<revision>/file is a link into blobs."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"digest-{path.name}")
        os.symlink(f"../../blobs/digest-{path.name}", snapshot / path.name)
    for load in LOADERS.values():
        assert load(snapshot) is not None


def test_a_file_that_never_ends_is_not_opened(folder):
    os.mkfifo(folder / "generation.json")
    with pytest.raises(CheckpointError, match=r"generation.json: expected a file"):
        check_folder(folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_a_stored_kernel_is_not_obeyed(folder, loader, key, monkeypatch):
    def fetch(name, *args, **kwargs):
        raise AssertionError(f"would fetch {name}")

    for place in (transformers.modeling_utils, transformers.integrations.hub_kernels):
        for name in ("lazy_import_flash_attention", "load_and_register_attn_kernel"):
            monkeypatch.setattr(place, name, fetch, raising=False)
    edit(folder, "config.json", **{key: "kernels-community/flash-attn3"})
    model = LOADERS[loader](folder)
    model = getattr(model, "model", model)
    assert model.config._attn_implementation == "sdpa"


def test_a_caller_chooses_the_attention(folder):
    edit(folder, "config.json", _attn_implementation="sdpa", _experts_implementation="deepgemm")
    model = load_whole(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    config, unused = load_config(folder, use_cache=False, nonsense=3)
    assert (config.use_cache, unused["nonsense"]) == (False, 3)
    assert config._experts_implementation is None


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_weights": "other.safetensors"},
        {"configuration_files": ["config.5.0.0.json"]},
        {"fusion_config": {"patch_embeddings": True}},
        {"torch_dtype": "load"},
        {"dtype": "save"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 400},
        {"num_labels": 10**9},
        {"tokenizer_class": "AutoModelForCausalLM"},
        {"num_attention_heads": 0},
        {"vocab_size": -5},
        {"vocab_size": len(WORDS) + 1},
        {"hidden_act": "nope"},
        {"pad_token_id": 10**9},
        {"rms_norm_eps": "nan"},
        {"rms_norm_eps": math.nan},
        {"head_dim": 10**9},
        {"hidden_size": 10**18},
        {"intermediate_size": 65},
        {"model_type": ["llama"]},
        {"model_type": "unheard-of"},
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 1.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("loader", ["load_teacher", "int8"])
def test_a_config_that_chooses_or_contradicts_is_refused_by_name(folder, loader, changes):
    edit(folder, "config.json", **changes)
    with pytest.raises(ValueError, match=str(folder)):
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("generation_config.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 3}}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["a"]}'),
        ("tokenizer_config.json", '{"tokenizer_class": "AutoModelForCausalLM"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "pipeline"}'),
        ("tokenizer_config.json", '{"init_inputs": ["/etc/passwd"]}'),
        ("special_tokens_map.json", "3"),
        ("added_tokens.json", "\xff"),
    ],
)
@pytest.mark.parametrize("loader", ["load_teacher", "int8"])
def test_a_damaged_file_is_refused_by_name(folder, loader, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(folder)) as caught:
        LOADERS[loader](folder)
    assert len(str(caught.value)) < 3000


def test_a_tokenizer_is_read_without_code_and_network(folder, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fetch)
    assert load_tokenizer(folder).get_vocab() == world_tokenizer().get_vocab()
    with pytest.raises(OSError, match=r"expected a folder with a tokenizer"):
        load_tokenizer(folder / "nowhere")


def test_names_of_modules_have_two_stars_at_most(tmp_path):
    """Libraries use them as regular expressions; gpt-oss has "model.layers.*.self_attn"."""
    key = "modules_to_not_convert"
    check_choices(tmp_path, {key: ["lm_head", "model.layers.*.self_attn", "a.*.b.*.c"]})
    for name in ("(a+)+$", "a*b*c*d", "a|b"):
        with pytest.raises(CheckpointError, match="expected names of modules, got"):
            check_choices(tmp_path, {key: [name]})


@pytest.mark.parametrize("loader", LOADERS)
def test_a_stored_tensor_without_a_place_is_refused(folder, loader):
    edit_weights(folder, **{f"model.mtp.{i}.weight": torch.ones(2) for i in range(5)})
    words = r"model.mtp.0.weight, model.mtp.1.weight, model.mtp.2.weight and 2 more, which it does"
    with pytest.raises(CheckpointError, match=words):
        LOADERS[loader](folder)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_transformers_does_not_need_is_no_hindrance(folder, loader):
    for i in range(2):
        buffers = {
            "self_attn.rotary_emb.inv_freq": torch.ones(4),
            "attn.bias": torch.ones(1, 1, 8, 8).tril(),
            "attn.masked_bias": torch.tensor(-1e9),
        }
        edit_weights(folder, **{f"model.layers.{i}.{name}": b for name, b in buffers.items()})
    assert LOADERS[loader](folder) is not None


@pytest.mark.parametrize("loader", LOADERS)
def test_a_weight_that_is_stored_twice_is_refused(folder, loader):
    edit_weights(folder, **{"norm.weight": torch.full((32,), 2.0)})
    with pytest.raises(CheckpointError, match=r"expected one tensor for model.norm.weight"):
        LOADERS[loader](folder)


def test_tensors_that_an_index_leaves_out_or_has_twice_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard_name, part in shards.items():
        save_file({n: weights[n] for n in part}, folder / shard_name, {"format": "pt"})
    where = {name: shard_name for shard_name, part in shards.items() for name in part}

    def write_index(weight_map):
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write_index(where)
    load_whole(folder)
    write_index(where | {names[0]: "b.safetensors"})
    with pytest.raises(CheckpointError, match="file without it"):
        load_whole(folder)
    twice = {n: weights[n] for n in [*shards["b.safetensors"], names[0]]}
    save_file(twice, folder / "b.safetensors", {"format": "pt"})
    write_index(where)
    with pytest.raises(CheckpointError, match="in no other shard"):
        load_whole(folder)
    save_file(twice | {"x": torch.ones(1)}, folder / "b.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"index without|in no other"):
        load_whole(folder)


def test_other_quantisations_and_options_are_refused(folder):
    edit(folder, "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match="'mxfp4'"):
        load_whole(folder)
    with pytest.raises(ValueError, match=r"trust_remote_code: expected False, or none, got True"):
        load_whole(folder, trust_remote_code=True)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a whole model, got .* holds adapter_config.json"):
        load_whole(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("place", ["token", "list", "top"])
def test_a_tokenizer_prints_nothing_that_acts_on_a_terminal(folder, capfd, file, place):
    """tokenizers prints names that it does not know to stderr, as they are."""
    name = "\x1b]0;title\x07"
    token = {"content": "<x>", name: 1, "__type": "AddedToken"}
    places: dict[str, dict[str, Any]] = {
        "token": {"pad_token": token},
        "list": {"extra": [token]},
        "top": {name: 1},
    }
    stored = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(stored | places[place]))
    capfd.readouterr()
    with pytest.raises(CheckpointError, match="expected a name of printable characters"):
        load_tokenizer(folder)
    assert not any("\x1b" in text for text in capfd.readouterr())
