"""Vision students: the student and a teacher in the process read the images of every row."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from transformers import LlavaProcessor
from transformers.image_processing_base import ImageProcessingMixin

from fastdistill.hf.encoder import Encoder
from fastdistill.hf.images import ImageInputs
from fastdistill.teachers.cache import TeacherCache
from fastdistill.teachers.http import ServedTeacher
from fastdistill.training.checks.images import check_images
from helpers import vision
from helpers.example_texts import tokenizer
from helpers.training import build, config, llama


def own_loss(student, teacher, rows):
    """Mean over targets of KL(teacher ‖ student) from full logits, a row at a time."""
    total, count = torch.zeros(()), 0
    for row in rows:
        keep = row["labels"][1:] != -100
        with torch.no_grad():
            p = vision.own_logits(teacher, row)[:-1][keep].log_softmax(-1)
        q = vision.own_logits(student, row)[:-1][keep].log_softmax(-1)
        total = total + F.kl_div(q, p, log_target=True, reduction="sum")
        count += int(keep.sum())
    return total / count


@pytest.mark.parametrize("kind", vision.KINDS)
def test_the_gradient_is_that_of_the_models_own_logits(tmp_path, kind):
    rows = vision.rows(kind)
    student, teacher = vision.build(kind), vision.build(kind, seed=1).eval()
    reference = vision.build(kind).train()
    expected = own_loss(reference, teacher, rows)
    expected.backward()
    trainer = build(tmp_path, model=student, teacher=teacher, data=rows, k=None)
    student.train()
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    seen = 0.0
    for (name, p), (_, q) in zip(
        student.named_parameters(), reference.named_parameters(), strict=True
    ):
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6, msg=name)
        seen += float(grads[0].norm()) if "vision" in name or "visual" in name else 0.0
    assert seen > 1e-3

    swapped = [dict(row) for row in rows]
    for name in set(rows[0]) - {"input_ids", "labels", "mm_token_type_ids"}:
        swapped[0][name], swapped[3][name] = rows[3][name], rows[0][name]
    with torch.no_grad():
        other = trainer.compute_loss(student, trainer.data_collator(swapped))
    assert abs(other.item() - loss.item()) > 1e-3


def test_a_processor_trains_evaluates_and_is_saved(tmp_path):
    rows = [*vision.rows("llava"), {"text": "a cat"}]
    processor = LlavaProcessor(ImageProcessingMixin(), tokenizer(), patch_size=4)
    student = vision.build("llava")
    trainer = build(
        tmp_path,
        model=student,
        teacher=vision.build("llava", seed=1),
        data=rows,
        eval_dataset=[{n: v.tolist() for n, v in row.items()} for row in rows[:4]],
        processing_class=processor,
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
    )
    before = {name: p.clone() for name, p in student.named_parameters()}
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < first
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert any("vision_tower" in name for name in moved)
    assert (tmp_path / "run" / "checkpoint-1" / "processor_config.json").exists()


@pytest.mark.parametrize("kind", vision.KINDS)
def test_a_path_is_read_as_the_loaded_model(tmp_path, kind):
    rows = vision.rows(kind)
    models = [vision.build(kind, seed=seed) for seed in (0, 1)]
    folders = [tmp_path / "student", tmp_path / "teacher"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    losses = []
    for student, teacher in (models, folders):
        trainer = build(tmp_path, model=student, teacher=teacher, data=rows)
        batch = trainer.data_collator(rows)
        losses.append(trainer.compute_loss(trainer.model.train(), batch).item())
    assert losses[0] == losses[1]


def test_a_student_that_teaches_itself_reads_its_images(tmp_path):
    rows = vision.rows("llava")
    trainer = build(tmp_path, model=vision.build("llava"), teacher="self", data=rows, k=None)
    trainer.model.train()
    assert abs(trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()) < 1e-6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"packing": True}, "packing: expected False with images in the rows, got True"),
        ({"lmbda": 0.5, "max_new_tokens": 4}, "lmbda: expected 0 with images in the rows, got 0.5"),
        ({"teacher": llama(1, vocab=vision.VOCAB)}, "teacher: expected a model that reads pixel"),
    ],
)
def test_what_would_lose_images_is_refused(tmp_path, options, expected):
    with pytest.raises(ValueError, match=expected):
        build(
            tmp_path,
            model=vision.build("llava"),
            data=vision.rows("llava"),
            **({"teacher": vision.build("llava", seed=1)} | options),
        )


@pytest.mark.parametrize("kind", [TeacherCache, ServedTeacher])
def test_caches_and_servers_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"teacher: expected a model in this .*{kind.__name__}"):
        check_images(["pixel_values"], object.__new__(kind), config(tmp_path))


QWEN = ImageInputs(
    ("pixel_values", "image_grid_thw", "mm_token_type_ids"), {"image": vision.IMAGE, "video": 61}
)
NO_IMAGE = dict.fromkeys(("pixel_values", "image_grid_thw", "mm_token_type_ids"))
IMAGED = vision.row("qwen2_vl", 0, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pixel_values": None}, "image_grid_thw: expected pixel_values or pixel_values_videos"),
        (NO_IMAGE, r"input_ids: expected pixel_values beside the image token \(id 60\), got"),
        (NO_IMAGE | {"input_ids": [1, 61]}, "input_ids: expected rows without the video token"),
        ({"input_ids": [1, 2]}, r"pixel_values: expected the image token \(id 60\) in input_ids"),
        ({"mm_token_type_ids": [0] * 13}, "mm_token_type_ids: expected 1 at image tokens"),
        ({"pixel_values": "a.png"}, "pixel_values: expected a tensor"),
        ({"input_features": torch.zeros(2, 2)}, "input_features: expected only columns"),
        ({"token_type_ids": [1] * 13}, "token_type_ids: expected zeros"),
    ],
)
def test_rows_whose_images_do_not_fit_are_refused(changes, expected):
    row = IMAGED | {"labels": None} | cast("dict[str, Any]", changes)
    with pytest.raises(ValueError, match=expected):
        Encoder(images=QWEN)(row)


def test_a_text_with_an_image_token_and_no_image_is_refused(tmp_path):
    image = vision.row("llava", 0, 1)
    with pytest.raises(ValueError, match=r"input_ids: expected pixel_values .*example 0 of train"):
        build(tmp_path, model=vision.build("llava"), data=[image | {"pixel_values": None}])


def test_audio_is_not_lost():
    reads = Encoder(images=ImageInputs((), {"audio": 9}))
    assert reads({"input_ids": [1, 2]}).images is None
    with pytest.raises(ValueError, match=r"input_ids: expected rows without the audio token"):
        reads({"input_ids": [1, 9]})


def test_samples_do_not_lose_images_that_no_check_before_training_reads(tmp_path):
    class Stream(IterableDataset[Any]):
        def __iter__(self):
            return iter(vision.rows("llava"))

    student, teacher = vision.build("llava"), vision.build("llava", seed=1)
    options = {"lmbda": 1.0, "max_new_tokens": 4, "max_steps": 1}
    trainer = build(tmp_path, model=student, teacher=teacher, data=Stream(), **options)
    with pytest.raises(ValueError, match="lmbda: expected 0 with images in the rows"):
        trainer.train()


def test_image_tokens_are_no_targets_and_are_not_cut():
    row = {name: value for name, value in IMAGED.items() if name != "labels"}
    encoded = Encoder(images=QWEN)(row)
    assert (encoded.targets == -100).tolist() == (row["input_ids"] == vision.IMAGE).tolist()
    assert Encoder(images=QWEN, max_length=7)(row).ids.tolist() == row["input_ids"][:7].tolist()
    with pytest.raises(ValueError, match="max_length: expected room for the images of a row"):
        Encoder(images=QWEN, max_length=5)(row)


def test_images_of_two_shapes_are_not_joined():
    parts = [{"pixel_values": torch.zeros(1, 3, n, n)} for n in (4, 8)]
    with pytest.raises(ValueError, match="pixel_values: expected one shape for all images"):
        QWEN.joined(parts, torch.zeros(2, 2, dtype=torch.long))
