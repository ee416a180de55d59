"""A teacher whose weights are elsewhere answers as one whose weights are here, or is refused."""

from __future__ import annotations

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdistill import TeacherCache
from fastdistill.hf.offloading import is_offloaded
from fastdistill.teachers.identity import weights_digest
from fastdistill.teachers.local import Teacher
from helpers.training import VOCAB, build, llama, ragged, step_losses

IDS = torch.arange(2, 26).view(2, 12) % VOCAB
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    for name, tied in (("plain", False), ("tied", True)):
        llama(1, scale=5.0, tied=tied).save_pretrained(folder / name)
    return folder


def on_disk(stored, tmp_path, parts, name="plain"):
    places = {part: "disk" if part in parts else "cpu" for part in PARTS}
    return AutoModelForCausalLM.from_pretrained(
        stored / name,
        device_map=places | {"model.rotary_emb": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )


def whole(stored, name="plain"):
    return AutoModelForCausalLM.from_pretrained(stored / name)


def same_answers(model, reference):
    assert is_offloaded(model)
    ours, theirs = Teacher(model), Teacher(reference)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    a, b = (t.topk(IDS, mask, k=VOCAB) for t in (ours, theirs))
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.hidden(IDS), theirs.hidden(IDS), rtol=1e-5, atol=1e-5)
    assert ours.vocab_size == VOCAB


@pytest.mark.parametrize("parts", [("lm_head",), PARTS[:1], PARTS[1:3], PARTS])
def test_parts_on_the_disk(stored, tmp_path, parts):
    same_answers(on_disk(stored, tmp_path, parts), whole(stored))


def test_a_tied_head_on_the_disk(stored, tmp_path):
    model = on_disk(stored, tmp_path, (PARTS[0], PARTS[-1]), "tied")
    same_answers(model, whole(stored, "tied"))


def test_offloaded_by_accelerate_alone(stored, tmp_path):
    model = accelerate.cpu_offload(whole(stored), execution_device=torch.device("cpu"))
    same_answers(model, whole(stored))
    model = accelerate.disk_offload(
        whole(stored), str(tmp_path / "offloaded"), execution_device=torch.device("cpu")
    )
    same_answers(model, whole(stored))


@pytest.mark.slow
def test_a_run_and_a_cache(stored, tmp_path):
    model, reference = on_disk(stored, tmp_path, PARTS), whole(stored)
    assert weights_digest(model) == weights_digest(reference)
    runs = []
    for teacher in (model, reference):
        trainer = build(tmp_path, model=llama(0), teacher=teacher, data=ragged())
        trainer.train()
        runs.append(step_losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    cache = TeacherCache.build(model, ragged(), tmp_path / "cache", k=8)
    trainer = build(tmp_path, model=llama(0), teacher=cache, data=ragged())
    trainer.train()
    assert step_losses(trainer) == pytest.approx(runs[0], rel=1e-2)


def test_an_offloaded_student_is_refused(stored, tmp_path):
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        build(tmp_path, model=on_disk(stored, tmp_path, PARTS), teacher=llama(2))


def test_weights_without_data_are_refused(stored):
    with torch.device("meta"):
        model = llama(1)
    with pytest.raises(ValueError, match=r"teacher: expected the weights of .* meta device"):
        Teacher(model)


def test_sharded_weights_are_refused():
    model = llama(1)
    for parameter in model.parameters():
        parameter.ds_id = 0
    with pytest.raises(ValueError, match="sharded by DeepSpeed's ZeRO-3"):
        Teacher(model)

    class FSDPModule:
        """What fully_shard puts into a module's class."""

    model = llama(1)
    model.__class__ = type("FSDPLlama", (FSDPModule, type(model)), {})
    with pytest.raises(ValueError, match="sharded by FSDP"):
        Teacher(model)
