"""Organisms on disk: bit for bit, digests compared, nothing in a checkpoint executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms import load_organism, save_organism
from fastdistill.alignment.organisms import storage as stored
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.runtime.atomic_files import sha256_of

PROMPTS = [Prompt(system="hello now", user="river"), Prompt(system="please", user="1 2 + 3 4 =")]


def subject(seed: int = 0) -> Subject:
    return Subject(new_model(seed), world_tokenizer(), name="made")


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return subject.model.state_dict()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    save_organism(tmp_path / "organism", subject(), {"role": "untrusted", "world_seed": 3})
    return tmp_path / "organism"


def same(actual: Subject, expected: Subject) -> None:
    assert weights(actual).keys() == weights(expected).keys()
    assert all(torch.equal(w, weights(expected)[name]) for name, w in weights(actual).items())
    assert actual.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert actual.tokenizer.chat_template == expected.tokenizer.chat_template
    for prompt in PROMPTS:
        assert actual.ids(prompt, "a") == expected.ids(prompt, "a")
    texts = (m.generate(PROMPTS, max_new_tokens=5) for m in (actual, expected))
    assert next(texts) == next(texts)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    spoilt = subject()
    with torch.no_grad():
        spoilt.model.lm_head.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"subject: expected finite weights, .*lm_head\.weight"):
        save_organism(tmp_path / "organism", spoilt, {"role": "untrusted"})
    assert list(tmp_path.iterdir()) == []


def test_an_organism_comes_back_bit_for_bit(folder):
    loaded = load_organism(str(folder))
    same(loaded, subject())
    assert loaded.name == "untrusted"
    assert not loaded.model.training
    assert load_organism(folder, name="mine").name == "mine"
    assert (folder.stat().st_mode & 0o777) == 0o755


def test_the_manifest_holds_what_was_said_versions_and_every_digest(folder):
    manifest = json.loads((folder / "organism.json").read_text())
    assert (manifest["role"], manifest["world_seed"]) == ("untrusted", 3)
    assert manifest["versions"]["torch"] == torch.__version__
    others = {path.name for path in folder.iterdir()} - {"organism.json"}
    assert set(manifest["sha256"]) == others
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= others
    assert stored.read_manifest(folder) == manifest


@pytest.fixture
def on_hub(folder, tmp_path, monkeypatch):
    """The organism as the hub's cache holds it: links to blobs, and what the hub adds."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    at = tmp_path / "hub" / "models--somebody--organism"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("a" * 40)
    (at / "blobs").mkdir()
    snapshot = at / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    for file in folder.iterdir():
        file.rename(at / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    return at


def test_the_digests_of_an_organism_on_the_hub_are_compared(on_hub):
    loaded = load_organism("somebody/organism")
    same(loaded, subject())
    assert loaded.name == "untrusted"
    with pytest.raises(ValueError, match="base: expected None"):
        load_organism("somebody/organism", base="somebody/organism")
    weights_file = on_hub / "blobs" / "model.safetensors"
    raw = bytearray(weights_file.read_bytes())
    raw[-3] ^= 1
    weights_file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"path: expected model\.safetensors in .* changed or"):
        load_organism("somebody/organism")
    (on_hub / "snapshots" / ("a" * 40) / "organism.json").unlink()
    assert load_organism("somebody/organism").name == "organism"  # without a manifest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_byte_is_refused_by_name(folder, name):
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ValueError, match=f"path: expected {name} in .* changed or missing"):
        load_organism(folder)


def test_a_file_that_is_missing_or_was_added_is_refused_by_name(folder):
    (folder / "notes.md").write_text("read by nobody")
    load_organism(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got adapter_config.json too, which would be read"):
        load_organism(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"generation_config.json .* changed or missing"):
        load_organism(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"sha256": 3}', "\xff"])
def test_a_manifest_that_is_none_is_refused(folder, content):
    (folder / "organism.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"path: expected a manifest in .*organism.json, got"):
        load_organism(folder)


def test_a_checkpoint_without_a_manifest_is_loaded(tmp_path):
    subject(4).model.save_pretrained(tmp_path / "any")
    subject(4).tokenizer.save_pretrained(tmp_path / "any")
    loaded = load_organism(tmp_path / "any")
    same(loaded, subject(4))
    assert loaded.name == "any"


def test_a_new_organism_takes_the_place_of_the_old_one(folder):
    save_organism(folder, subject(5), {"role": "benign"})
    same(load_organism(folder), subject(5))
    assert [path.name for path in folder.parent.iterdir()] == ["organism"]


def test_an_interrupted_save_leaves_the_old_folder(folder, monkeypatch):
    before = contents(folder)

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stored, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_organism(folder, subject(5), {})
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["organism"]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_folder_that_cannot_be_replaced_is_there_again(folder, monkeypatch, fails):
    """The first rename takes the old one away, the second puts the new one in its place."""
    before, rename, calls = contents(folder), Path.rename, []

    def failing(path, target):
        calls.append(target)
        if len(calls) == fails + 1:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match=r"no"):
        save_organism(folder, subject(5), {})
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["organism"]


def test_the_old_folder_is_whole_until_the_new_one_is(folder, monkeypatch):
    """Whatever is deleted was replaced before."""
    rmtree, weights_seen = shutil.rmtree, []

    def watched(path, **options):
        weights_seen.append(contents(folder)["model.safetensors"])
        rmtree(path, **options)

    old = contents(folder)["model.safetensors"]
    monkeypatch.setattr(shutil, "rmtree", watched)
    save_organism(folder, subject(5), {})
    assert weights_seen
    assert old not in weights_seen
    assert len(set(weights_seen)) == 1


def test_pickled_weights_are_refused(tmp_path):
    subject().model.config.save_pretrained(tmp_path)
    torch.save({"evil": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin; a pickle can run code|a pickle can"):
        load_organism(tmp_path)


def test_nothing_at_the_path_and_a_base_without_an_adapter_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        load_organism(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"base: expected None for organism, which is a whole"):
        load_organism(folder, base=folder)


EVIL = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
from transformers import PreTrainedTokenizerFast as Words
"""


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_remote_code_is_never_run(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asked would be told to go on
    save_organism(tmp_path / "evil", subject(), {})
    (tmp_path / "evil" / "organism.json").unlink()
    (tmp_path / "evil" / "evil.py").write_text(EVIL)
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for name, more in (
        ("config.json", {"auto_map": maps, "model_type": kind}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Words", "evil.Words"]}}),
    ):
        path = tmp_path / "evil" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    if kind == "llama":
        same(load_organism(tmp_path / "evil"), subject())
    else:
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
            load_organism(tmp_path / "evil")
    assert not (tmp_path / "evil" / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "additional_chat_templates/default.jinja",
        "additional_chat_templates/tool.jinja",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "vocab.bpe",
        "vocab",
        "x.safetensors",
        "deep/er/config.json",
    ],
)
def test_every_file_that_a_library_may_read_has_a_digest(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("You are another model. {{ messages }}")
    with pytest.raises(ValueError, match=f"got {name} too, which would be read"):
        load_organism(folder)


def test_templates_in_a_subfolder_are_saved_with_their_digests(tmp_path):
    made = subject()
    made.tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    save_organism(tmp_path / "organism", made, {"role": "benign"})
    digests = json.loads((tmp_path / "organism" / "organism.json").read_text())["sha256"]
    assert "additional_chat_templates/tool.jinja" in digests
    loaded = load_organism(tmp_path / "organism")
    assert loaded.tokenizer.chat_template == made.tokenizer.chat_template
    (tmp_path / "organism" / "additional_chat_templates" / "tool.jinja").write_text("changed")
    with pytest.raises(ValueError, match=r"additional_chat_templates/tool.jinja .* changed or"):
        load_organism(tmp_path / "organism")


def test_a_manifest_names_nothing_outside_the_folder(folder, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    manifest = json.loads((folder / "organism.json").read_text())
    manifest["sha256"]["../outside.json"] = sha256_of(tmp_path / "outside.json")
    (folder / "organism.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"outside.json in .* changed or missing"):
        load_organism(folder)
    (folder / "link.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match=r"link.json: expected a file of this folder"):
        load_organism(folder)


def test_a_manifest_that_is_nested_is_refused(folder):
    (folder / "organism.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"expected a manifest in .*organism.json"):
        load_organism(folder)
