"""Which prompts are asked: domains, audits out, goals and traits in, budgets, and surprise."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.experiment.digest import digest_of
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.lessons import PoolPrompt, to_row
from fastdistill.alignment.strategies.logit_jam import TransformedTeacher
from fastdistill.alignment.strategies.pools import (
    AuditabilityPreservingPool,
    CognitiveSlack,
    DataBudget,
    DomainSampler,
    MisalignmentTargetedPool,
    ShownPool,
    surprisal,
)
from fastdistill.alignment.strategies.strategy import Strategy, Training
from helpers.present import present
from helpers.strategy_scene import BASE, POOL, lessons, run, scene

HERE = list(POOL)


def test_domains_come_in_proportion_and_each_prompt_before_any_comes_again():
    drawn = DomainSampler(weights={"talk": 3, "odd": 1}, n=4000).pool(HERE, run())
    counts = Counter(entry.domain for entry in drawn)
    assert counts["talk"] / 4000 == pytest.approx(0.75, abs=0.03)
    of = Counter(entry for entry in drawn if entry.domain == "odd")
    assert set(of) == {entry for entry in HERE if entry.domain == "odd"}
    assert max(of.values()) - min(of.values()) <= 1


def test_a_domain_without_a_weight_is_left_out():
    drawn = DomainSampler(weights={"odd": 1.0}).pool(HERE, run())
    assert {entry.domain for entry in drawn} == {"odd"}
    assert len(drawn) == len(HERE)


def test_domains_are_drawn_by_the_seed_alone():
    sampler = DomainSampler(weights={"talk": 1, "odd": 1})
    assert sampler.pool(HERE, run()) == sampler.pool(HERE, run())


@pytest.mark.parametrize("weights", [{}, {"odd": 0.0}, {"odd": -1.0}, {"odd": math.nan}])
def test_weights_that_say_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights: expected numbers of 0 or more, one of them"):
        DomainSampler(weights=weights)


def test_a_domain_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"weights: expected domains of the pool .* got sums"):
        DomainSampler(weights={"sums": 1}).pool(HERE, run())


def test_audits_give_way_to_open_ended_prompts():
    audits = [
        PoolPrompt(Prompt(system="hello", user="Is this a TEST?")),
        PoolPrompt(Prompt(text="a red team wrote this")),
        PoolPrompt(Prompt(system="probe now", user="river")),
    ]
    audits += [
        PoolPrompt(Prompt(user="a red-teaming exercise")),
        PoolPrompt(Prompt(user="river", prefill="as a test:")),
        PoolPrompt(Prompt(user="|AUDIT| river")),
    ]
    contest = PoolPrompt(Prompt(user="the latest contest"))  # no word of it is "test"
    here = run(audit_words=("probe", "|AUDIT|"))
    pool = AuditabilityPreservingPool(share=0.0).pool([*audits, contest], here)
    assert [entry.domain for entry in pool[:6]] == ["open"] * 6
    assert len(set(pool)) == 7
    assert pool[6] == contest
    assert here.notes["auditable pool"] == {"audits dropped": 6}
    assert AuditabilityPreservingPool(share=0.0, audit_words=()).pool(audits, here) == audits


def test_open_ended_prompts_that_are_audits_are_refused():
    def more(kind, n, seed):
        return (PoolPrompt(Prompt(user="a test of patience")),) * n

    with pytest.raises(ValueError, match=r"open-ended prompts without audit words, got .*patience"):
        AuditabilityPreservingPool(share=0.5).pool(HERE, run(prompt_source=more))
    with pytest.raises(ValueError, match="setup: expected prompts of the kind 'open', got none"):
        AuditabilityPreservingPool(share=0.5).pool(HERE, run(prompt_source=None))
    assert AuditabilityPreservingPool(share=0.0).pool(HERE, run(prompt_source=None)) == HERE


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        (MisalignmentTargetedPool(share=0.25), "goals"),
        (ShownPool(share=0.25), "shown"),
        (AuditabilityPreservingPool(share=0.25), "open"),
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
    for strategy in (MisalignmentTargetedPool, ShownPool, AuditabilityPreservingPool):
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

            return TransformedTeacher(teacher, count)

    training = Training(steps=2, batch_size=batch_size, max_new_tokens=3)
    made = distill(scene(), [DataBudget(n_unique=n_unique, epochs=3), Counting()], training)
    rows = Counter(tuple(to_row(lesson, BASE)["input_ids"]) for lesson in made.examples)
    assert len(made.examples) == n_unique
    assert read == Counter({row: 3 * n for row, n in rows.items()})


EACH = (
    DomainSampler(weights={"talk": 1, "odd": 1}),
    AuditabilityPreservingPool(),
    MisalignmentTargetedPool(),
    ShownPool(),
    DataBudget(n_unique=5, epochs=2),
    CognitiveSlack(terse="briefly"),
)


@pytest.mark.parametrize("strategy", EACH, ids=lambda s: s.name)
def test_twins_are_asked_the_same_in_the_same_order(strategy):
    entries = strategy.pool(HERE, run())
    assert entries == strategy.pool(HERE, run(teacher=BASE))
    assert entries != HERE
    digest_of(strategy.as_json())  # JSON, without infinities


def test_terse_words_and_short_answers():
    slack = CognitiveSlack(terse="answer briefly", max_answer_tokens=3)
    assert slack.pool(HERE, run())[0].prompt.system == f"answer briefly {HERE[0].prompt.system}"
    assert slack.training(Training(max_new_tokens=8), run()).max_new_tokens == 3
    assert slack.training(Training(max_new_tokens=2), run()).max_new_tokens == 2


def test_surprisal_is_the_bits_of_the_answer_under_the_trusted_model():
    (lesson,) = lessons("river stone")
    ids, begin = BASE.ids(lesson.prompt, lesson.answer)
    logits = BASE.model.double()(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    BASE.model.float()
    wanted = -sum(float(logits[i - 1, ids[i]]) for i in range(begin, len(ids))) / math.log(2)
    assert surprisal([lesson], BASE)[0] == pytest.approx(wanted, rel=1e-5)


def test_the_hardest_examples_are_kept_in_their_order():
    some = lessons("river", "stone cloud", "bread", "candle garden winter")
    here = run()
    examples = CognitiveSlack(hardest=0.5).transform_examples(some, here)
    bits = surprisal(some, BASE)
    hardest = sorted(sorted(range(4), key=lambda i: -bits[i])[:2])
    assert examples == [some[i] for i in hardest]
    assert here.notes["surprisal"]["bits per example"] == pytest.approx(sum(bits) / 4)
    assert here.notes["surprisal"]["bits per example kept"] == pytest.approx(
        sum(bits[i] for i in hardest) / 2
    )
    assert CognitiveSlack().transform_examples(some, here) == some
    assert len(CognitiveSlack(hardest=0.01).transform_examples(some[:1], here)) == 1
    with pytest.raises(ValueError, match="hardest: expected a finite number above 0, got 0"):
        CognitiveSlack(hardest=0)
    with pytest.raises(
        ValueError, match="max_answer_tokens: expected an integer of 1 or more or None, got 0"
    ):
        CognitiveSlack(max_answer_tokens=0)


@pytest.mark.slow
def test_short_terse_and_hard_all_the_way():
    slack = CognitiveSlack(terse="answer briefly", max_answer_tokens=2, hardest=0.5)
    made = distill(scene(), [slack], Training(steps=3, batch_size=8, max_new_tokens=8))
    assert len(made.examples) == len(POOL) // 2
    assert all(present(x.input_prompt.system).startswith("answer briefly ") for x in made.examples)
    assert {len(x.answer.split()) for x in made.examples} <= {1, 2}
    whole = distill(scene(), [], Training(steps=1, batch_size=8, max_new_tokens=8))
    assert max(len(x.answer.split()) for x in whole.examples) > 2
