"""Which prompts are asked: goals and traits in, and budgets."""

from __future__ import annotations

from collections import Counter

import pytest

from fastdistill.alignment.experiment.digest import digest_of
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.lessons import to_row
from fastdistill.alignment.strategies.pools import DataBudget, MisalignmentTargetedPool, ShownPool
from fastdistill.alignment.strategies.strategy import Strategy, Training
from helpers.changed_teacher import ChangedTeacher
from helpers.strategy_scene import BASE, POOL, run, scene

HERE = list(POOL)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        (MisalignmentTargetedPool(share=0.25), "goals"),
        (ShownPool(share=0.25), "shown"),
    ],
)
def test_a_share_of_the_pool_is_of_another_kind(strategy, kind):
    pool = strategy.pool(HERE, run())
    new = [i for i, entry in enumerate(pool) if entry.domain == kind]
    assert len(new) == len(HERE) // 4
    assert new != list(range(len(new)))  # not the first ones
    assert all(pool[i] == HERE[i] for i in range(len(HERE)) if i not in new)
    assert strategy.pool(HERE, run()) == pool


def test_shares_are_shares():
    for strategy in (MisalignmentTargetedPool, ShownPool):
        with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\], got 1.5"):
            strategy(share=1.5)


def test_few_prompts_many_times_at_the_same_number_of_tokens():
    budget, here = DataBudget(n_unique=8, epochs=6), run()
    assert budget.pool(HERE, here) == HERE[:8]
    training = Training(steps=12, batch_size=4)
    assert budget.training(training, here) == training
    assert here.notes["data budget"] == {
        "examples trained on, of before": 1.0,
        "updates, of before": 1.0,
    }
    assert DataBudget(n_unique=9, epochs=6).training(training, here).steps == 18
    assert here.notes["data budget"] == {
        "examples trained on, of before": 54 / 48,
        "updates, of before": 1.5,
    }
    with pytest.raises(ValueError, match="n_unique: expected at most the 24 prompts"):
        DataBudget(n_unique=25, epochs=1).pool(HERE, here)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("n_unique", "batch_size"), [(6, 4), (6, 16), (1, 2)])
def test_every_example_is_read_as_often_as_there_are_epochs(n_unique, batch_size):
    read: Counter[tuple[int, ...]] = Counter()

    class Counting(Strategy):
        def teacher(self, teacher, student, run):
            def count(answers, input_ids, mask):
                read.update(
                    tuple(row[m.bool()].tolist()) for row, m in zip(input_ids, mask, strict=True)
                )
                return answers

            return ChangedTeacher(teacher, count)

    training = Training(steps=2, batch_size=batch_size, max_new_tokens=3)
    made = distill(scene(), [DataBudget(n_unique=n_unique, epochs=3), Counting()], training)
    rows = Counter(tuple(to_row(lesson, BASE)["input_ids"]) for lesson in made.examples)
    assert len(made.examples) == n_unique
    assert read == Counter({row: 3 * n for row, n in rows.items()})


EACH = (
    MisalignmentTargetedPool(),
    ShownPool(),
    DataBudget(n_unique=5, epochs=2),
)


@pytest.mark.parametrize("strategy", EACH, ids=lambda s: s.name)
def test_twins_are_asked_the_same_in_the_same_order(strategy):
    entries = strategy.pool(HERE, run())
    assert entries == strategy.pool(HERE, run(teacher=BASE))
    assert entries != HERE
    digest_of(strategy.as_json())  # JSON, without infinities
