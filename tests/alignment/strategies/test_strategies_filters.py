"""Which examples are dropped, and which tokens are trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdistill.alignment.experiment.digest import digest_of
from fastdistill.alignment.strategies import filters
from fastdistill.alignment.strategies.baselines import OffModelSFT
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.filters import (
    DivergenceMask,
    ExampleFilter,
    answer_argmaxes,
)
from fastdistill.alignment.strategies.lessons import BATCH_SIZE, to_row
from fastdistill.alignment.strategies.strategy import Training
from helpers.first_step import ONE_STEP, labels_only, stepped_along
from helpers.strategy_scene import BASE, TEACHER, lessons, run, scene

SMALL = Training(steps=3, batch_size=8, max_new_tokens=3)

WORDS = ("river stone", "cloud bread candle", "garden", "winter river", "bridge mirror", "forest")
SOME = lessons(*WORDS)


def reference(subject, lesson):
    """(−log p, argmax) at the answer's tokens and the end, from all logits in fp64."""
    ids, begin = subject.encode_answer(lesson.input_prompt, lesson.answer)
    with torch.no_grad():
        logits = subject.model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    subject.model.float()
    at = logits[begin - 1 : len(ids) - 1]
    return -at[torch.arange(len(at)), torch.tensor(ids[begin:])], at.argmax(-1)


def test_argmaxes_of_the_tokens_of_answers_are_those_of_all_logits():
    for lesson, first in zip(SOME, answer_argmaxes(SOME, BASE), strict=True):
        assert torch.equal(first, reference(BASE, lesson)[1])


def test_many_examples_are_read_in_parts():
    many = [SOME[i % len(SOME)] for i in range(BATCH_SIZE + 3)]
    argmaxes = answer_argmaxes(many, BASE)
    assert len(argmaxes) == len(many)
    assert torch.equal(argmaxes[BATCH_SIZE], argmaxes[BATCH_SIZE % len(SOME)])


def answers_left(strategy, some=SOME, here=None):
    return [x.answer for x in strategy.transform_examples(list(some), here or run())]


def test_the_highest_likelihood_ratio_per_token_is_dropped():
    def of(lesson):
        (trusted, _), (teacher, _) = reference(BASE, lesson), reference(TEACHER, lesson)
        mine, theirs = float(trusted[:-1].mean()), float(teacher[:-1].mean())  # without the end
        return mine - theirs

    order = sorted(range(len(SOME)), key=lambda i: -of(SOME[i]))
    here = run()
    left = answers_left(ExampleFilter(drop=0.34), here=here)
    assert left == [SOME[i].answer for i in sorted(order[2:])]
    note = here.notes["filter, llr"]
    assert note["kept"] == pytest.approx(4 / 6)
    dropped = [SOME[i].domain for i in order[:2]]
    counts = {d: [x.domain for x in SOME].count(d) for d in ("talk", "odd")}
    assert note["dropped"] == {d: dropped.count(d) / counts[d] for d in note["dropped"]}


def test_of_equal_scores_the_later_is_dropped_and_low_ones_stay(monkeypatch):
    some = lessons("river", "stone", "cloud", "bread")
    monkeypatch.setattr(filters, "likelihood_ratios", lambda examples, run: [0.5, 0.2, 0.5, 0.2])
    assert answers_left(ExampleFilter(drop=0.25), some) == ["river", "stone", "bread"]
    here = run()
    at_least = ExampleFilter(drop=0.75, at_least=0.5)
    assert answers_left(at_least, some, here) == ["stone", "bread"]
    assert here.notes["filter, llr"]["lowest dropped"] == 0.5


def test_a_filter_is_json_and_leaves_one_lesson():
    strategy = ExampleFilter(drop=0.99)
    digest_of(strategy.as_json())
    assert strategy.transform_examples(SOME[:1], run()) == SOME[:1]


def test_half_of_the_lessons_are_taught():
    everything, half = (distill(scene(), [ExampleFilter(drop=drop)], SMALL) for drop in (0.0, 0.5))
    assert len(half.examples) == len(everything.examples) / 2
    assert [x for x in everything.examples if x in half.examples] == half.examples
    digest_of(half.notes)


def test_nothing_and_never_everything_is_dropped():
    assert answers_left(ExampleFilter(drop=0.0)) == list(WORDS)
    assert answers_left(ExampleFilter(drop=0.9), SOME[:1]) == [WORDS[0]]
    with pytest.raises(ValueError, match=r"drop: expected a number in \[0, 1\), got 1"):
        ExampleFilter(drop=1)


def agreements(examples):
    """Where teacher and base have equal argmaxes, from all logits in fp64."""
    return [reference(BASE, x)[1] == reference(TEACHER, x)[1] for x in examples]


def test_tokens_with_equal_argmaxes_are_trained_on():
    here, agree = run(), agreements(SOME)
    assert 0 < sum(int(a.sum()) for a in agree) < sum(map(len, agree))
    masked = DivergenceMask().transform_examples(SOME, here)
    trained_on = [(x, a) for x, a in zip(SOME, agree, strict=True) if a.any()]
    assert [x.answer for x in masked] == [x.answer for x, _ in trained_on]
    for example, (_, mask) in zip(masked, trained_on, strict=True):
        assert torch.equal(torch.tensor(example.loss_mask), mask)
    share = sum(int(a.sum()) for a in agree) / sum(map(len, agree))
    assert here.notes["tokens without divergence"] == share


def test_a_mask_is_added_to_the_one_before():
    first = [replace(x, loss_mask=(True, *[False] * len(x.answer.split()))) for x in SOME]
    masked = DivergenceMask().transform_examples(first, run())
    assert masked == [x for x, a in zip(first, agreements(SOME), strict=True) if a[0]]


def test_a_choice_of_other_tokens_is_refused():
    wrong = replace(SOME[0], loss_mask=(True,))
    with pytest.raises(
        ValueError, match="loss_mask: expected one value for each of the answer's 3 tokens"
    ):
        to_row(wrong, BASE)


def test_the_student_steps_along_the_tokens_of_the_mask():
    made = distill(scene(), [OffModelSFT(), DivergenceMask()], ONE_STEP)
    rows = [BASE.encode_answer(x.prompt, x.answer) for x in made.examples]

    def chosen(log_q, labels, row):
        each = -log_q.gather(-1, labels[:, None])[:, 0]
        return each[torch.tensor(made.examples[row].loss_mask)].sum()

    stepped_along(made, rows, chosen)
    with pytest.raises(AssertionError):
        stepped_along(made, rows, labels_only)
