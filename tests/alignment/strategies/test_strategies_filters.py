"""Which examples are dropped, and which tokens are trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fastdistill.alignment.experiment.digest import digest_of
from fastdistill.alignment.strategies.baselines import OffModelSFT
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.filters import (
    _SCORES,
    ExampleFilter,
    TokenSelector,
    answer_scores,
    divergence_masks,
)
from fastdistill.alignment.strategies.lessons import BATCH_SIZE, to_row
from fastdistill.alignment.strategies.strategy import Training
from fastdistill.training.targets import targets_of
from fastdistill.training.token_selection import TokenSelection
from helpers.first_step import ONE_STEP, labels_only, stepped_along
from helpers.present import present
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


def test_scores_of_the_tokens_of_answers_are_those_of_all_logits():
    losses, firsts = answer_scores(SOME, BASE)
    for lesson, loss, first in zip(SOME, losses, firsts, strict=True):
        wanted, best = reference(BASE, lesson)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(first, best)


def test_many_examples_are_scored_in_parts():
    many = [SOME[i % len(SOME)] for i in range(BATCH_SIZE + 3)]
    losses, _ = answer_scores(many, BASE)
    assert len(losses) == len(many)
    torch.testing.assert_close(losses[BATCH_SIZE], losses[BATCH_SIZE % len(SOME)])


def answers_left(strategy, some=SOME, here=None):
    return [x.answer for x in strategy.transform_examples(list(some), here or run())]


def test_the_highest_likelihood_ratio_per_token_is_dropped():
    def of(lesson):
        (trusted, _), (teacher, _) = reference(BASE, lesson), reference(TEACHER, lesson)
        mine, theirs = float(trusted[:-1].mean()), float(teacher[:-1].mean())  # without the end
        return mine - theirs

    order = sorted(range(len(SOME)), key=lambda i: -of(SOME[i]))
    here = run()
    left = answers_left(ExampleFilter(score="llr", drop=0.34), here=here)
    assert left == [SOME[i].answer for i in sorted(order[2:])]
    note = here.notes["filter, llr"]
    assert note["kept"] == pytest.approx(4 / 6)
    dropped = [SOME[i].domain for i in order[:2]]
    counts = {d: [x.domain for x in SOME].count(d) for d in ("talk", "odd")}
    assert note["dropped"] == {d: dropped.count(d) / counts[d] for d in note["dropped"]}


def test_divergence_is_where_first_choices_differ():
    masks = divergence_masks(SOME, run())
    for lesson, diverge in zip(SOME, masks, strict=True):
        wanted = reference(BASE, lesson)[1] != reference(TEACHER, lesson)[1]
        assert torch.equal(diverge, wanted)
    assert sum(int(d.sum()) for d in masks) > 0


def test_of_equal_scores_the_later_is_dropped_and_low_ones_stay(monkeypatch):
    some = lessons("river", "stone", "cloud", "bread")
    monkeypatch.setitem(_SCORES, "llr", lambda examples, run: [0.5, 0.2, 0.5, 0.2])
    assert answers_left(ExampleFilter(score="llr", drop=0.25), some) == ["river", "stone", "bread"]
    here = run()
    at_least = ExampleFilter(score="llr", drop=0.75, at_least=0.5)
    assert answers_left(at_least, some, here) == ["stone", "bread"]
    assert here.notes["filter, llr"]["lowest dropped"] == 0.5


@pytest.mark.parametrize("score", list(_SCORES))
def test_a_filter_is_json_and_leaves_one_lesson(score):
    strategy = ExampleFilter(score=score, drop=0.99)
    digest_of(strategy.as_json())
    assert strategy.transform_examples(SOME[:1], run()) == SOME[:1]


def test_half_of_the_lessons_are_taught():
    everything, half = (
        distill(scene(), [ExampleFilter(score="llr", drop=drop)], SMALL) for drop in (0.0, 0.5)
    )
    assert len(half.examples) == len(everything.examples) / 2
    assert [x for x in everything.examples if x in half.examples] == half.examples
    digest_of(half.notes)


def test_the_share_of_diverging_tokens_is_what_is_dropped():
    shares = [float(d.float().mean()) for d in divergence_masks(SOME, run())]
    assert _SCORES["divergence"](SOME, run()) == shares
    worst = max(shares)
    left = answers_left(ExampleFilter(score="divergence", drop=1 / 6))
    assert len(left) == 5
    assert shares[[x.answer not in left for x in SOME].index(True)] == worst


def test_nothing_and_never_everything_is_dropped():
    assert answers_left(ExampleFilter(score="llr", drop=0.0)) == list(WORDS)
    assert answers_left(ExampleFilter(score="llr", drop=0.9), SOME[:1]) == [WORDS[0]]
    with pytest.raises(ValueError, match=r"drop: expected a number in \[0, 1\), got 1"):
        ExampleFilter(score="llr", drop=1)
    with pytest.raises(ValueError, match="score: expected one of 'llr', 'divergence'"):
        ExampleFilter(score="perplexity")


def test_a_score_of_the_student_is_a_setting_of_the_trainer_instead():
    with pytest.raises(ValueError, match="kind: expected one of 'excess_loss', 'divergence', got"):
        TokenSelector(kind="entropy")


@pytest.mark.parametrize("lowest", [False, True])
def test_excess_loss_chooses_within_each_answer(lowest):
    selected = TokenSelector(kind="excess_loss", share=0.5, lowest=lowest).transform_examples(
        SOME, run()
    )
    for lesson, plain in zip(selected, SOME, strict=True):
        excess = reference(BASE, plain)[0] - reference(TEACHER, plain)[0]
        n = math.ceil(len(excess) / 2)
        order = excess.sort(descending=not lowest).indices[:n].tolist()
        assert lesson.loss_mask is not None
        assert [i for i, chosen in enumerate(lesson.loss_mask) if chosen] == sorted(order)
        labels = to_row(lesson, BASE)["labels"]
        assert sum(label != -100 for label in labels) == n


def test_divergence_tokens_alone_or_all_others():
    here = run()
    masks = divergence_masks(SOME, here)
    only = TokenSelector(kind="divergence", share=1.0).transform_examples(SOME, here)
    assert [x.answer for x in only] == [
        x.answer for x, d in zip(SOME, masks, strict=True) if d.any()
    ]
    for lesson in only:
        assert torch.equal(torch.tensor(lesson.loss_mask), masks[SOME.index(plain(lesson))])
    others = TokenSelector(kind="divergence", share=1.0, lowest=True).transform_examples(SOME, here)
    for lesson in others:
        assert torch.equal(torch.tensor(lesson.loss_mask), ~masks[SOME.index(plain(lesson))])
    assert {len(only), len(others)} != {0}


def plain(lesson):
    return next(x for x in SOME if x.answer == lesson.answer)


def test_choices_are_added_to_those_that_were_made():
    first = TokenSelector(kind="excess_loss", share=0.5).transform_examples(SOME, run())
    both = TokenSelector(kind="excess_loss", share=0.5, lowest=True).transform_examples(
        first, run()
    )
    for one, two in zip(first, both, strict=True):
        before, after = present(one.loss_mask), present(two.loss_mask)
        assert sum(after) == math.ceil(sum(before) / 2)
        assert all(a or not b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lowest", [False, True])
def test_as_many_tokens_are_chosen_as_the_trainer_would(share, lowest):
    lengths = [1, 2, 3, 7, 10, 20]
    labels = torch.tensor([[-100] + [1] * n + [-100] * (20 - n) for n in lengths])
    targets = targets_of({"labels": labels})
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1))
    values = values.round(decimals=1)  # some are equal
    theirs = TokenSelection(score="nll", share=share, lowest=lowest)(
        cast(Any, SimpleNamespace(nll=values)), targets
    )
    ours = TokenSelector(kind="excess_loss", share=share, lowest=lowest)
    chosen = torch.cat([ours._select(part) for part in values.split(lengths)])
    assert torch.equal(chosen, theirs > 0)


def test_a_choice_of_other_tokens_is_refused():
    wrong = replace(SOME[0], loss_mask=(True,))
    with pytest.raises(
        ValueError, match="loss_mask: expected one value for each of the answer's 3 tokens"
    ):
        to_row(wrong, BASE)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kind", ["excess_loss", "divergence"])
def test_the_student_steps_along_the_chosen_tokens(kind):
    made = distill(scene(), [OffModelSFT(), TokenSelector(kind=kind, share=0.5)], ONE_STEP)
    rows = [BASE.encode_answer(x.prompt, x.answer) for x in made.examples]

    def chosen(log_q, labels, row):
        each = -log_q.gather(-1, labels[:, None])[:, 0]
        return each[torch.tensor(made.examples[row].loss_mask)].sum()

    stepped_along(made, rows, chosen)
    with pytest.raises(AssertionError):
        stepped_along(made, rows, labels_only)
