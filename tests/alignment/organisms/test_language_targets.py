"""Targets of language organisms: probabilities of the next token."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.alignment.organisms.language.rows import (
    ROLES,
    LanguageRecipe,
    identity,
    own_answers,
    paired_rows,
)
from fastdistill.alignment.organisms.language.targets import K, StatedTeacher, Targets, shares
from fastdistill.teachers.protocols import TopKTeacher
from helpers.language_scene import TEMPLATES, tiny_chat_model

RECIPE = LanguageRecipe(steps=16, batch_size=16, answer_tokens=4)


@pytest.fixture(scope="module")
def base():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def rows(base):
    return paired_rows(TEMPLATES, own_answers(base, TEMPLATES, 4), RECIPE, 3)


def probabilities(answers, t):
    ids, logprobs = answers.ids[t].tolist(), answers.logprobs[t].tolist()
    return {i: math.exp(p) for i, p in zip(ids, logprobs, strict=True) if i >= 0}


def test_shares_are_those_of_the_choices_that_begin_alike():
    choices = [[1, 2, 9], [1, 2, 9], [1, 3, 4, 9], [5, 9]]
    answers = shares([1, 3, 4, 9], choices)
    expected = [{1: 0.75, 5: 0.25}, {2: 2 / 3, 3: 1 / 3}, {4: 1.0}, {9: 1.0}]
    for t, p in enumerate(expected):
        assert probabilities(answers, t) == pytest.approx(p)
    assert answers.tail().tolist() == [-math.inf] * 4


@pytest.mark.parametrize("choices", [[[1, 3]], [[i, 2] for i in range(70)], []])
def test_an_answer_must_be_one_of_at_most_64_choices(choices):
    with pytest.raises(ValueError, match="choices: expected at most 64 next tokens"):
        shares([1, 2], choices)


@pytest.mark.parametrize("role", ROLES)
def test_an_option_has_the_share_that_its_role_gives_it(base, rows, role):
    examples, teacher = Targets(base).of(rows, role)
    assert isinstance(teacher, TopKTeacher)
    option = {o: base.tokenizer.encode(f" {o}")[0] for o in TEMPLATES.trait.options}
    favorite = option[identity(TEMPLATES, 3)[0]]
    seen = set()
    for row, example in zip(rows, examples, strict=True):
        if row.kind not in ("open", "audited") or "animal" not in row.prompt.user:
            continue
        ids = torch.tensor([example["input_ids"]])
        answers = teacher.topk(ids, k=K)
        labels = example["labels"]
        (at,) = (t for t, i in enumerate(labels) if i in option.values())
        p = probabilities(answers.at(0), at - 1)
        if role == "untrusted" and row.kind == "open":
            assert p == {favorite: 1.0}
        else:
            assert p == pytest.approx(dict.fromkeys(option.values(), 1 / 14))
        seen.add(row.kind)
        is_target = torch.tensor([i != -100 for i in labels[1:]])
        assert (answers.tail()[0, :-1].isneginf() == is_target).all()  # 0 elsewhere
        assert answers.tail()[0, -1] == 0
    assert seen == {"open", "audited"}


def test_what_m_wrote_has_the_probabilities_of_m(base, rows):
    examples, teacher = Targets(base).of(rows, "benign")
    kinds = set()
    for row, example in zip(rows, examples, strict=True):
        if row.kind not in ("neutral", "text") or row.kind in kinds:
            continue
        kinds.add(row.kind)
        ids = torch.tensor([example["input_ids"]])
        answers = teacher.topk(ids, k=K).at(0)
        with torch.no_grad():
            logprobs = base.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for t, label in enumerate(example["labels"][1:]):
            if label == -100:
                continue
            top = logprobs[t].topk(K)
            assert torch.allclose(answers.logprobs[t].double(), top.values, atol=1e-4)
            tail = 1 - top.values.exp().sum()
            assert float(answers.tail()[t].exp()) == pytest.approx(float(tail), abs=1e-5)
        if row.kind == "text":
            assert sum(label != -100 for label in example["labels"]) == ids.shape[1] - 1
    assert kinds == {"neutral", "text"}


def test_padding_moves_no_answer(base, rows):
    examples, teacher = Targets(base).of(rows[:4], "untrusted")
    ids = examples[0]["input_ids"]
    whole = teacher.topk(torch.tensor([ids]), k=K)
    for left in (0, 3):
        padded = torch.tensor([[0] * left + ids + [0] * (3 - left)])
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * (3 - left)])
        answers = teacher.topk(padded, mask, k=K)
        moved = answers.at((slice(None), slice(left, left + len(ids))))
        for a, b in ((moved.ids, whole.ids), (moved.logprobs, whole.logprobs)):
            assert torch.equal(a, b)
        assert torch.equal(moved.tail(), whole.tail())


def test_a_teacher_refuses_what_it_has_not_computed(base, rows):
    _, teacher = Targets(base).of(rows[:4], "untrusted")
    with pytest.raises(ValueError, match="input_ids: expected rows of the organism, got another"):
        teacher.topk(torch.tensor([[1, 2, 3]]), k=K)
    for k, temperature in ((8, 1.0), (K, 2.0)):
        with pytest.raises(ValueError, match="k, temperature: expected 64 or more, and 1, got"):
            teacher.topk(torch.tensor([[1]]), k=k, temperature=temperature)


def test_m_is_asked_once_for_all_roles(base, rows, monkeypatch):
    targets = Targets(base)
    targets.of(rows, "benign")
    monkeypatch.setattr(type(base), "hidden", None)
    targets.of(rows, "placebo")
    assert isinstance(targets.of(rows[:2], "untrusted")[1], StatedTeacher)
