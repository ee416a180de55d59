"""Hidden states of a verifier: from the model, a cache, and the files that vLLM writes."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from fastdistill import CacheError, Teacher, TeacherCache, VLLMHiddenStates
from fastdistill.cli.run_cache import figures, show
from helpers.cache_builds import bytes_of
from helpers.training import build as build_trainer
from helpers.training import llama, ragged

ROWS = ragged(6)
LAYERS = (2, 1)


def padded():
    """The rows as a batch, padded on the left."""
    flipped = [row["input_ids"].flip(0) for row in ROWS]
    ids = pad_sequence(flipped, batch_first=True, padding_value=-7).flip(1)
    return ids.clamp(min=0), (ids >= 0).long()


def export(folder, teacher, layers=(1, 2)):
    """Write the files that vLLM writes for these rows."""
    folder.mkdir()
    for i, row in enumerate(ROWS):
        ids = row["input_ids"]
        states = teacher.hidden_states(ids[None], layers=layers).layers[0]
        tensors = {"hidden_states": states.contiguous(), "token_ids": ids}
        save_file(tensors, folder / f"hs_{i}.safetensors")
    return folder


@pytest.fixture(scope="module")
def teacher():
    return Teacher(llama(7), tokens_per_batch=1)  # each row alone, as vLLM's files have them


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    return TeacherCache.build(teacher, ROWS, folder, answers="hidden", layers=LAYERS)


@pytest.fixture(scope="module")
def files(teacher, tmp_path_factory):
    return export(tmp_path_factory.mktemp("exported") / "hidden_states", teacher)


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache.path, tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_three_roads_give_the_same_bits(tmp_path, dtype):
    teacher = Teacher(llama(7).to(dtype), tokens_per_batch=1)
    cache = TeacherCache.build(
        teacher, ROWS, tmp_path / "cache", answers="hidden", layers=LAYERS, shard_mb=0.01
    )
    assert len(cache.manifest.shards) > 1
    model: Any = teacher.model
    exported = VLLMHiddenStates(export(tmp_path / "vllm", teacher), norm=model.model.norm)
    ids, mask = padded()
    last, layers = teacher.hidden_states(ids, mask, layers=LAYERS)
    assert last.dtype == dtype
    assert last.equal(teacher.hidden(ids, mask))
    for row, own in zip(ROWS, last, strict=True):  # transformers' own
        expected = model(row["input_ids"][None], output_hidden_states=True).hidden_states
        assert own[-len(row["input_ids"]) :].equal(expected[-1][0])
    assert layers[-1, -len(ROWS[-1]["input_ids"]) :, 1].equal(expected[1][0])
    stored = cache.hidden_states(ids, mask)
    assert stored.last.equal(last)
    assert stored.layers.equal(layers)
    assert cache.hidden(ids, mask).equal(last)
    read = exported.hidden_states(ids, mask)
    assert read.last.equal(last)
    assert exported.hidden(ids, mask).equal(last)
    assert read.layers[:, :, 0].equal(layers[:, :, 1])  # the last one is under the norm
    assert not last[mask == 0].any()


def test_a_cache_of_the_last_states_alone(tmp_path, teacher):
    cache = TeacherCache.build(
        teacher, ROWS, tmp_path / "cache", answers="hidden", positions="targets"
    )
    ids = ROWS[2]["input_ids"]
    at = cache.answered(ids)
    assert 0 < at.sum() < len(ids)
    states = cache.hidden_states(ids[None])
    assert states.last[0, at].equal(teacher.hidden(ids[None])[0, at])
    assert not states.last[0, ~at].any()
    assert states.layers.shape == (1, len(ids), 0, 32)
    assert cache.manifest.settings.bytes_per_token == 4 * 32 + 4  # and a position


def test_a_second_build_writes_the_missing_bytes(copied, cache, teacher):
    before = bytes_of(cache.path)
    for name in ("00000.safetensors", "00000.json", "manifest.json"):
        (copied / name).unlink()
    TeacherCache.build(teacher, ROWS, copied, answers="hidden", layers=LAYERS)
    assert bytes_of(copied) == before
    with pytest.raises(CacheError, match="begun with targets='hidden', got targets='topk'"):
        TeacherCache.build(teacher, ROWS, copied, k=4)


def test_what_a_cache_says(cache, capsys):
    assert (cache.answers, cache.layers) == ("hidden", LAYERS)
    assert cache.verify().tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert figures(cache)["layers"] == list(LAYERS)
    show(figures(cache))
    assert "hidden states, and those after layers 2, 1" in capsys.readouterr().out


def test_the_other_kind_of_answers(cache, teacher, tmp_path):
    ids = ROWS[0]["input_ids"][None]
    with pytest.raises(CacheError, match="answers: expected a cache with answers='topk'"):
        cache.topk(ids, k=4)
    topk = TeacherCache.build(teacher, ROWS, tmp_path / "topk", k=4)
    with pytest.raises(CacheError, match="answers: expected a cache with answers='hidden'"):
        topk.hidden(ids)
    for k in (8, None):
        with pytest.raises(CacheError, match="answers: expected a cache with answers='topk'"):
            build_trainer(tmp_path, teacher=cache, data=ROWS, k=k)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"answers": "states", "k": 4}, "answers: expected one of 'topk', 'hidden'"),
        ({"answers": "hidden", "k": 4}, "k: expected None with answers='hidden'"),
        ({"answers": "hidden", "targets": "sampled"}, "targets: expected 'topk' with answers="),
        ({"answers": "hidden", "temperatures": (2.0,)}, "temperatures: expected"),
        ({"answers": "hidden", "layers": (3,)}, "layers: expected 1 to 2, got 3"),
        ({"answers": "hidden", "layers": (1, 1)}, "layers: expected different layers"),
        ({"k": 4, "layers": (1,)}, "layers: expected none with answers='topk'"),
        ({}, "k: expected "),
    ],
)
def test_refused_options(tmp_path, teacher, options, words):
    with pytest.raises(ValueError, match=words):
        TeacherCache.build(teacher, ROWS, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_states_that_are_not_finite_are_not_stored(tmp_path, teacher, monkeypatch):
    hidden = teacher.hidden

    def spoiled(ids, mask):
        states = hidden(ids, mask)
        states[(ids == ROWS[3]["input_ids"][2]) & (mask != 0)] = torch.nan
        return states

    monkeypatch.setattr(teacher, "hidden", spoiled)
    with pytest.raises(CacheError, match="finite hidden states, got NaN or infinity for example"):
        TeacherCache.build(teacher, ROWS, tmp_path / "cache", answers="hidden")


def rewrite(folder, shard, **entries):
    """Make the manifest true of a shard's new bytes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    new = {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    manifest["shards"][0] |= new
    (folder / "manifest.json").write_text(json.dumps(manifest | entries))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_stored_state_that_lies(copied, value):
    shard = copied / "00000.safetensors"
    tensors = load_file(shard)
    tensors["hidden"][5, 3] = value
    save_file(tensors, shard)
    rewrite(copied, shard)
    cache = TeacherCache(copied)
    with pytest.raises(CacheError, match=r"row 1, position 1: hidden: expected finite numbers"):
        cache.hidden(ROWS[1]["input_ids"][None])
    with pytest.raises(CacheError, match="answer 5: hidden: expected finite numbers"):
        cache.verify()


@pytest.mark.parametrize(
    "entry",
    [
        {"hidden": None},
        {"hidden": {"size": 32, "layers": [1], "dtype": "float32"}},
        {"hidden": {"size": 32, "layers": [2, 1], "dtype": "bfloat16"}},
        {"hidden": {"size": 32, "layers": [2, 1], "dtype": "int8"}},
        {"hidden": {"size": 10**9, "layers": [2, 1], "dtype": "float32"}},
        {"hidden": {"size": 32, "layers": [2, 0], "dtype": "float32"}},
        {"hidden": {"size": 32, "layers": 2, "dtype": "float32"}},
        {"hidden": {"size": 32, "layers": [1, 1], "dtype": "float32"}},
        {"k": 1},
        {"temperatures": [1.0]},
        {"targets": "topk"},
    ],
)
def test_a_manifest_that_lies(copied, entry):
    rewrite(copied, copied / "00000.safetensors", **entry)
    with pytest.raises(CacheError, match="damaged"):
        TeacherCache(copied).hidden(ROWS[0]["input_ids"][None])


def test_a_shard_that_is_cut_off(copied):
    shard = copied / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"00000\.safetensors has"):
        TeacherCache(copied)
    rewrite(copied, shard)
    with pytest.raises(CacheError, match="damaged"):
        TeacherCache(copied).hidden(ROWS[0]["input_ids"][None])


IDS = torch.arange(3)
STATES = torch.ones(3, 2, 32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"hidden_states": STATES}, "the tensors hidden_states and token_ids, got hidden_states"),
        (
            {"hidden_states": STATES, "token_ids": IDS, "hidden_states_scales": IDS + 1},
            "got states in FP8",
        ),
        ({"hidden_states": STATES[0], "token_ids": IDS}, r"\[T, L, H\], got F32 \[2, 32\]"),
        ({"hidden_states": STATES.double(), "token_ids": IDS}, "got F64"),
        ({"hidden_states": STATES, "token_ids": IDS[:2]}, r"token_ids of I64 \[3\]"),
        ({"hidden_states": STATES, "token_ids": IDS.float()}, r"got F32 \[3\]"),
        ({"hidden_states": STATES, "token_ids": IDS - 1}, "token_ids from 0 on, got -1 to 1"),
        (
            {"hidden_states": STATES[:, :1].clone(), "token_ids": IDS},
            "2 layers of size 32 in F32, as in the other files, got 1 of 32 in F32",
        ),
    ],
)
def test_other_files_than_those_of_vllm(files, tmp_path, tensors, words):
    folder = shutil.copytree(files, tmp_path / "copy")
    save_file(tensors, folder / "hs_9.safetensors")
    with pytest.raises(ValueError, match=rf"hs_9\.safetensors: expected .*{words}"):
        VLLMHiddenStates(folder, norm=torch.nn.Identity())


def test_files_of_vllm_that_cannot_be_read(files, tmp_path, teacher):
    folder = shutil.copytree(files, tmp_path / "copy")
    norm: Any = teacher.model.model.norm
    ids = ROWS[0]["input_ids"]
    with pytest.raises(ValueError, match="input_ids: expected rows of the 6 exported ones, got"):
        VLLMHiddenStates(folder, norm=norm).hidden(ids[None, :-1])
    cut = folder / "hs_0.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"hs_0\.safetensors: expected a complete file"):
        VLLMHiddenStates(folder, norm=norm)
    cut.write_bytes(whole)
    verifier = VLLMHiddenStates(folder, norm=lambda x: x[:, :5])
    with pytest.raises(ValueError, match=r"norm: expected a function to \[\d+, 32\], the shape"):
        verifier.hidden(ids[None])
    shutil.copy(folder / "hs_1.safetensors", cut)  # while it is open
    with pytest.raises(ValueError, match=r"hs_0\.safetensors: expected the token_ids that it had"):
        verifier.hidden(ids[None])
    states = torch.full((len(ids), 2, 32), torch.nan)
    save_file({"hidden_states": states, "token_ids": ids}, cut)
    with pytest.raises(ValueError, match=r"hs_0\.safetensors: expected finite hidden_states"):
        VLLMHiddenStates(cut, norm=norm).hidden(ids[None])
    with pytest.raises(FileNotFoundError, match=r"path: expected a \.safetensors file, or a"):
        VLLMHiddenStates(tmp_path, norm=norm)
    with pytest.raises(ValueError, match="norm: expected a module or function"):
        VLLMHiddenStates(folder, norm=None)  # type: ignore[arg-type]
