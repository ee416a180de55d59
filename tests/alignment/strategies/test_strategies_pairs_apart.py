"""DPO beside other strategies: what takes pairs apart, or would have no effect, is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.dpo import PreferencePairs
from fastdistill.alignment.strategies.shift import ShiftDistill
from fastdistill.alignment.strategies.strategy import Strategy, Training
from helpers.strategy_scene import BASE, POOL, scene


@dataclass(frozen=True, kw_only=True)
class Less(Strategy):
    """Drops the first lesson, whatever it is of."""

    def transform_examples(self, lessons, run):
        return lessons[1:]


@dataclass(frozen=True, kw_only=True)
class Parts(Strategy):
    def transform_examples(self, lessons, run):
        return [replace(x, loss_mask=(False,)) for x in lessons]


SHORT = Training(steps=1, batch_size=8, max_new_tokens=3)


@pytest.mark.slow
def test_what_takes_pairs_apart_is_refused_behind_them_and_welcome_before():
    with pytest.raises(ValueError, match="examples: expected two adjacent answers"):
        distill(scene(), [PreferencePairs(), Less()], SHORT)
    whole = distill(scene(), [PreferencePairs()], SHORT)
    less = distill(scene(), [Less(), PreferencePairs()], SHORT)
    first = [lesson.prompt for lesson in less.examples[0::2]]
    assert first
    assert POOL[0].prompt in {lesson.prompt for lesson in whole.examples}
    assert POOL[0].prompt not in first


@pytest.mark.parametrize(
    ("others", "settings", "words"),
    [
        (
            [ShiftDistill(amplify=2.0)],
            {},
            "teacher: expected no strategy before PreferencePairs that changes distributions",
        ),
        ([Parts()], {}, "loss_mask: expected whole answers with PreferencePairs"),
        (
            [],
            {"token_selection": "entropy top 0.5"},
            "token_selection: expected no value with PreferencePairs",
        ),
        ([], {"ce_weight": 0.5}, "ce_weight: expected no value with PreferencePairs"),
    ],
)
def test_what_would_have_no_effect_is_refused(others, settings, words):
    training = replace(SHORT, settings=settings)
    with pytest.raises(ValueError, match=words):
        distill(scene(), [*others, PreferencePairs()], training)


def test_rejected_answers_are_sampled_as_the_chosen_ones(monkeypatch):
    calls = []
    real = type(BASE).generate

    def generate(self, prompts, **how):
        calls.append(how)
        return real(self, prompts, **how)

    monkeypatch.setattr(type(BASE), "generate", generate)
    distill(scene(), [PreferencePairs()], replace(SHORT, temperature=0.7), seed=5)
    assert calls == [{"max_new_tokens": 3, "temperature": 0.7, "seed": 5}] * 2


def test_models_that_say_the_same_leave_no_pair():
    with pytest.raises(ValueError, match="got none after PreferencePairs"):
        distill(scene(teacher=BASE), [PreferencePairs()], replace(SHORT, temperature=0.0))
