"""Selections choose within a sequence, keep its weight, and refuse what cannot be one."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from fastdistill.losses.types import TokenScores
from fastdistill.training.targets import targets_of
from fastdistill.training.token_selection import SCORES, TokenSelection, selection_of, weights_of

LENGTHS = [7, 1, 0, 12]  # targets of each sequence
T = 14


def targets():
    labels = torch.full((4, T), -100)
    for row, n in enumerate(LENGTHS):
        labels[row, 1 : 1 + n] = 5
    return targets_of({"labels": labels})


def scores(**values):
    n = sum(LENGTHS)
    fields = dict.fromkeys(TokenScores._fields, torch.zeros(n))
    return TokenScores(**(fields | values))


ENTROPY = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("side", ["top", "bottom"])
def test_a_share_of_every_sequence(share, side):
    rule = TokenSelection.parse(f"entropy {side} {share}")
    weights = weights_of(rule, scores(entropy=ENTROPY), targets())
    start = 0
    for n in LENGTHS:
        mine, weight = ENTROPY[start : start + n], weights[start : start + n]
        start += n
        if not n:
            continue
        m = -(-round(share * n * 1000) // 1000)
        best = mine.topk(m, largest=side == "top").indices
        assert sorted(best.tolist()) == weight.nonzero()[:, 0].tolist()
        assert weight.sum().item() == pytest.approx(n)
        assert weight[best].unique().numel() == 1


def test_equal_scores_keep_the_first():
    weights = weights_of(TokenSelection.parse("entropy top 0.5"), scores(), targets())
    assert weights[:7].tolist() == [7 / 4] * 4 + [0.0] * 3


def test_thresholds_and_weights():
    at_least = weights_of(
        TokenSelection.parse("entropy >= 0.5"), scores(entropy=ENTROPY), targets()
    )
    assert torch.equal(at_least, (ENTROPY >= 0.5).float())
    at_most = weights_of(TokenSelection.parse("entropy<=0.5"), scores(entropy=ENTROPY), targets())
    assert torch.equal(at_most, (ENTROPY <= 0.5).float())
    soft = weights_of(TokenSelection.parse("entropy weight"), scores(entropy=ENTROPY), targets())
    torch.testing.assert_close(soft[:7], ENTROPY[:7] / ENTROPY[:7].mean())
    assert soft[7] == 1.0
    nothing = weights_of(TokenSelection.parse("entropy weight"), scores(), targets())
    assert torch.equal(nothing, torch.ones(sum(LENGTHS)))


def test_a_function_of_the_scores():
    weights = weights_of(lambda s: s.entropy > 0.5, scores(entropy=ENTROPY), targets())
    assert torch.equal(weights, (ENTROPY > 0.5).float())
    with pytest.raises(ValueError, match=r"expected weights of shape \[20\], .* got \[3\]"):
        weights_of(lambda s: torch.ones(3), scores(), targets())
    for bad in (-1.0, float("nan"), float("inf")):

        def shifted(s, bad=bad):
            return s.entropy + bad

        with pytest.raises(ValueError, match="finite weights of 0 or more"):
            weights_of(shifted, scores(), targets())


@pytest.mark.parametrize(
    "words", ["entropy top 0.2", "nll bottom 0.5", "margin <= 1.5", "lse >= 2", "forward_kl weight"]
)
def test_words_are_read_and_written(words):
    assert str(selection_of(words)) == words
    assert selection_of(str(selection_of(words))) == selection_of(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("surprise top 0.2", "expected one of 'lse', 'entropy', .* got 'surprise'"),
        ("entropy top 20%", "expected '<score> top"),
        ("entropy top 1.5", r"share in \(0, 1\], got 1.5"),
        ("entropy", "expected '<score> top"),
        ("max_logprob weight", "never negative as a weight, got 'max_logprob'"),
        ("entropy >= nan", "finite threshold"),
    ],
)
def test_what_is_no_selection_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        selection_of(words)


def test_one_rule_at_a_time():
    with pytest.raises(ValueError, match="expected one of share, threshold and weight"):
        TokenSelection(score="entropy")
    with pytest.raises(ValueError, match="expected one of share, threshold and weight"):
        TokenSelection(score="entropy", share=0.5, weight=True)
    with pytest.raises(TypeError, match="expected a str, a TokenSelection or a function"):
        selection_of(cast(Any, 3))


def test_every_float_score_can_select():
    assert set(SCORES) == set(TokenScores._fields) - {"argmax"}
