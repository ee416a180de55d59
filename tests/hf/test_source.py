"""One place says what a path is, and every route takes the same paths with the same words."""

from __future__ import annotations

import json
import shutil
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdistill import TeacherCache
from fastdistill.alignment.audits.subject import Subject
from fastdistill.cli.loaders import open_tokenizer
from fastdistill.hf.checkpoint import StoredModel
from fastdistill.hf.source import source_of
from fastdistill.teachers.local import Teacher, load_teacher
from fastdistill.teachers.open import open_teacher
from fastdistill.training.plan.shapes import config_of
from helpers.training import VOCAB, build, llama, ragged, step_losses


class Tokenizer:
    """As much of one as a Subject looks at when it is made."""

    eos_token_id = None

    def decode(self, ids, **options):
        return ""


CPU = torch.device("cpu")
ROUTES = {
    "load_teacher": lambda path: load_teacher(path, device="cpu"),
    "Teacher": Teacher,
    "stored": lambda path: StoredModel.from_path(path).load(CPU),
    "subject": lambda path: Subject(path, tokenizer=Tokenizer(), device="cpu"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base, adapter on it, the model of both)."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    llama(1, scale=5.0).save_pretrained(base)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(adapter)
    return base, adapter, model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits.log_softmax(-1)


IDS = torch.arange(3, 19)[None] % VOCAB


@pytest.mark.parametrize("route", ROUTES)
def test_an_adapter_is_read_by_every_route(folders, route):
    _, adapter, model = folders
    actual = ROUTES[route](adapter)
    actual = actual.model if isinstance(actual, (Teacher, Subject)) else actual
    torch.testing.assert_close(logits(actual, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


def test_a_quantised_adapter_is_merged_first(folders):
    _, adapter, model = folders
    teacher = load_teacher(adapter, quant="int8", device="cpu")
    actual, expected = logits(teacher.model, IDS), logits(model, IDS)
    assert (actual.exp() - expected.exp()).abs().max() < 0.05
    report = teacher.fidelity({"input_ids": IDS.repeat(2, 1)})
    assert report.kl < 0.01  # against the adapter's full precision, and not the base's


@pytest.mark.slow
def test_a_cache_and_a_run_of_an_adapter(folders, tmp_path):
    _, adapter, model = folders
    cache = TeacherCache.build(adapter, ragged(), tmp_path / "cache", k=8)
    runs = []
    for teacher in (cache, adapter, str(tmp_path / "cache"), model):
        trainer = build(tmp_path, model=llama(0), teacher=teacher, data=ragged())
        trainer.train()
        runs.append(step_losses(trainer))
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-2)


def test_a_student_goes_on_from_its_adapter(folders, tmp_path):
    base, adapter, _ = folders
    trainer = build(tmp_path, model=adapter, teacher=llama(2), data=ragged())
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert trainer.train().global_step == 2
    after = trainer.model.get_base_model().state_dict()
    for name, tensor in before.items():
        if "q_proj" not in name and "v_proj" not in name:
            assert torch.equal(tensor, after[name])


def test_a_checkpoint_of_a_training_with_adapters_is_an_adapter(folders, tmp_path):
    """It has a file named settings.json, as an unfinished cache has."""
    trainer = build(
        tmp_path,
        model=folders[1],
        teacher=llama(2),
        data=ragged(),
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "settings.json").is_file()
    assert source_of("teacher", checkpoint).kind == "adapter"
    expected = logits(trainer.model.eval(), IDS)
    torch.testing.assert_close(logits(StoredModel.from_path(checkpoint).load(CPU), IDS), expected)


def test_the_configuration_under_an_adapter(folders):
    base, adapter, _ = folders
    assert config_of("student", adapter).to_dict() == config_of("student", base).to_dict()


def test_an_adapter_whose_base_is_gone(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"base_model_name_or_path": str(tmp_path / "gone")}))
    for route in ROUTES.values():
        with pytest.raises(FileNotFoundError, match=r"base: expected the model under the adapter"):
            route(tmp_path / "adapter")


@pytest.mark.parametrize("route", [*ROUTES, "open_teacher", "config", "tokenizer"])
def test_a_typo(tmp_path, route):
    more: dict[str, Any] = {
        "open_teacher": open_teacher,
        "config": lambda path: config_of("student", path),
        "tokenizer": lambda path: open_tokenizer(str(path)),
    }
    with pytest.raises((FileNotFoundError, ValueError), match="where nothing exists"):
        (ROUTES | more)[route](tmp_path / "nowhere")


@pytest.mark.parametrize("route", ROUTES)
def test_a_folder_of_gguf_files_says_to_name_one(tmp_path, route):
    (tmp_path / "b-Q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "a-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"name the file: .*a-Q4_0\.gguf"):
        ROUTES[route](tmp_path)


@pytest.mark.parametrize("route", ROUTES)
def test_pickles_and_nothing(tmp_path, route):
    with pytest.raises(ValueError, match=r"expected a directory with config\.json"):
        ROUTES[route](tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got pytorch_model\.bin; a pickle can run code"):
        ROUTES[route](tmp_path)
    with pytest.raises(ValueError, match="a pickle can run code"):
        ROUTES[route](tmp_path / "pytorch_model.bin")


def test_kinds(folders, tmp_path):
    base, adapter, _ = folders
    assert source_of("teacher", base).kind == "model"
    assert source_of("teacher", adapter).kind == "adapter"
    assert source_of("teacher", "http://host:1").kind == "server"
    assert source_of("teacher", "owner/model-of-nobody").kind == "hub"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert source_of("teacher", tmp_path / "a.gguf").kind == "gguf"
    (base / "manifest.json").write_text("{}")  # of an application, beside a model
    assert source_of("teacher", base).kind == "model"
    (base / "manifest.json").unlink()


@pytest.mark.parametrize("name", ["x" * 5000, "/x/" + "y" * 300, "~nobody-of-this-name/x", "\0"])
def test_a_name_that_no_system_takes_is_of_nothing(folders, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint or the hub's name of one"):
        source_of("teacher", name)
    adapter = shutil.copytree(folders[1], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(FileNotFoundError, match=r"base: expected the model under the adapter"):
        load_teacher(adapter, device="cpu")
