"""A cache answers as its teacher did, and says by name what it cannot answer."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill import CacheError, Teacher, TeacherCache, TopK
from fastdistill.alignment.experiment.demo.models import shipped_folder
from helpers.answers import Answers, spread
from helpers.present import present
from helpers.training import VOCAB, llama, peaked, ragged


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_folder())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    teacher = Teacher(peaked())
    options: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0), "shard_mb": 0.004}
    return teacher, TeacherCache.build(teacher, ragged(40), folder, **options)


def same(actual: TopK, expected: TopK):
    """Slot by slot of every position that has an answer: fp16 apart."""
    where = actual.ids[..., 0] >= 0
    order = expected.ids.sort(-1)
    assert torch.equal(actual.ids[where].long(), order.values[where])
    logprobs = expected.logprobs.gather(-1, order.indices)
    assert (actual.logprobs[where] - logprobs[where]).abs().max() < 1e-2
    assert torch.allclose(
        present(actual.log_tail)[where], present(expected.log_tail)[where], atol=1e-5
    )
    return where


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_answers_as_its_teacher(built, temperature):
    teacher, cache = built
    assert len(cache.manifest.shards) > 3
    for row in ragged(40):
        ids = row["input_ids"][None]
        answers = cache.topk(ids, k=8, temperature=temperature)
        assert same(answers, teacher.topk(ids, k=8, temperature=temperature)).all()
        assert answers.temperature == temperature


def test_rows_are_found_in_whatever_padding(built):
    teacher, cache = built
    rows = [ragged(40)[i]["input_ids"] for i in (3, 17, 5)]
    length = max(map(len, rows)) + 2
    ids, mask = torch.zeros(4, length, dtype=torch.int32), torch.zeros(4, length, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(2, 2 + len(row)) if i == 1 else slice(0, len(row))
        ids[i, at], mask[i, at] = row.int(), True
    answers = cache.topk(ids, mask, k=8)
    assert torch.equal(same(answers, teacher.topk(ids, mask, k=8)), mask)
    assert answers.log_tail[~mask].eq(0).all()
    scattered = torch.zeros(1, 2 * len(rows[0]), dtype=torch.int64)
    scattered[0, ::2] = rows[0]
    mask = torch.arange(scattered.shape[1])[None] % 2 == 0
    apart = cache.topk(scattered, mask, k=8)
    assert torch.equal(apart.ids[mask], answers.ids[0, : len(rows[0])])


def test_fewer_slots_than_stored(built):
    teacher, cache = built
    ids = ragged(40)[9]["input_ids"][None]
    answers, exact = cache.topk(ids, k=3), teacher.topk(ids, k=3)
    assert torch.equal(answers.ids.sort(-1).values.long(), exact.ids.sort(-1).values)
    total = answers.logprobs.exp().sum(-1) + present(answers.log_tail).exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_targets_only_leaves_out_prompts(tmp_path):
    teacher, rows = Teacher(peaked()), ragged(12)
    cache = TeacherCache.build(teacher, rows, tmp_path / "c", k=4, positions="targets")
    targets = sum(int((row["labels"][1:] >= 0).sum()) for row in rows)
    assert cache.manifest.tokens == targets
    for row in rows:
        ids = row["input_ids"][None]
        where = same(cache.topk(ids, k=4), teacher.topk(ids, k=4))
        assert torch.equal(where[0, :-1], row["labels"][1:] >= 0)
        assert not where[0, -1]


def test_text_needs_the_tokenizer_and_remembers_it(tmp_path, tokenizer):
    model = llama(0, vocab=len(tokenizer))
    texts = [{"text": "def f(x):\n    return x"}, {"prompt": "import ", "completion": "os"}]
    cache = TeacherCache.build(model, texts, tmp_path / "c", k=4, tokenizer=tokenizer)
    ids = tokenizer(texts[0]["text"])["input_ids"] + [tokenizer.eos_token_id]
    assert cache.has(torch.tensor(ids))
    assert not cache.has(torch.tensor(ids[:-1]))
    assert ids in cache
    assert torch.tensor(ids) in cache
    assert all(other not in cache for other in (ids[:-1], "text", 7, None, [0.5], [ids]))
    TeacherCache(cache.path, tokenizer=tokenizer)
    other = AutoTokenizer.from_pretrained(shipped_folder())
    other.add_tokens(["<new>"])
    with pytest.raises(CacheError, match=r"tokenizer: expected the one that .* was built with"):
        TeacherCache(cache.path, tokenizer=other)


def test_what_the_manifest_says(built, tmp_path):
    _, cache = built
    manifest = json.loads((cache.path / "manifest.json").read_text())
    assert (manifest["k"], manifest["temperatures"], manifest["vocab_size"]) == (
        8,
        [1.0, 2.0],
        VOCAB,
    )
    assert manifest["tokens"] == sum(len(row["input_ids"]) for row in ragged(40))
    assert manifest["teacher"]["kind"] == "fastdistill.teachers.local.Teacher"
    assert manifest["teacher"]["dtype"] == "float32"
    assert len(manifest["teacher"]["weights_sha256"]) == len(manifest["shards"][0]["sha256"]) == 64
    other = TeacherCache.build(Teacher(peaked(8)), ragged(2), tmp_path / "c", k=8)
    theirs = other.manifest.settings.teacher
    assert theirs["config_sha256"] == manifest["teacher"]["config_sha256"]
    assert theirs["weights_sha256"] != manifest["teacher"]["weights_sha256"]


def test_it_travels_to_another_process(built):
    cache = built[1]
    cache.topk(ragged(40)[0]["input_ids"][None], k=8)
    again = pickle.loads(pickle.dumps(cache))
    ids = ragged(40)[4]["input_ids"][None]
    assert torch.equal(again.topk(ids, k=8).logprobs, cache.topk(ids, k=8).logprobs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 9}, r"k: expected an integer in 1\.\.8"),
        ({"k": 0}, "k: expected"),
        ({"k": 8, "temperature": 1.5}, r"temperature: expected one .* for \(1, 2\), got 1\.5"),
        ({"k": 8, "temperature": 0.0}, "temperature: expected a finite number above 0"),
    ],
)
def test_what_it_does_not_have(built, options, words):
    with pytest.raises(ValueError, match=words):
        built[1].topk(ragged(40)[0]["input_ids"][None], **options)


def test_other_rows_are_named(built):
    ids = torch.tensor([ragged(40)[0]["input_ids"].tolist(), [5, 6, 7, 8]])
    with pytest.raises(CacheError, match=r"row 1 \(4 tokens: 5, 6, 7, 8, …\) is none of its 40"):
        built[1].topk(ids, k=8)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, T\]"):
        built[1].topk(ids[0], k=8)
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        built[1].topk(ids, torch.ones(2, 3), k=8)


def test_ids_beyond_a_students_vocabulary_go(tmp_path):
    cache = TeacherCache.build(
        Answers(lambda ids, k: TopK(spread(ids, k), torch.full((*ids.shape, k), 0.2).log())),
        [{"input_ids": [48, 49, 3]}],
        tmp_path / "c",
        k=4,
    )
    cache.valid_vocab = 51
    answers = cache.topk(torch.tensor([[48, 49, 3]]), k=4)
    assert answers.ids[0].max() == 50
    assert (answers.ids[0, 0] >= 0).sum() == 3
    total = answers.logprobs.exp().sum(-1) + present(answers.log_tail).exp()
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    probabilities = answers.logprobs[0, 0].exp()
    assert probabilities[answers.ids[0, 0] >= 0].tolist() == pytest.approx([0.25] * 3, abs=1e-3)
