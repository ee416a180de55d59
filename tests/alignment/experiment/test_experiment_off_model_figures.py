"""Figures and verdicts of the study "off-model", of runs whose figures are known."""

from __future__ import annotations

import math

import pytest

from fastdistill.alignment.experiment.off_model.analysis import (
    capability_drop,
    cost_differences,
    drop_per_nat,
    family,
    ratio,
    reasoning_differences,
    recovered_share,
    restored_share,
    weak_differences,
)
from fastdistill.alignment.experiment.off_model.arms import (
    OFF_MODEL,
    ON_BASE,
    OWN,
    WHOLE,
    arm_names,
)
from fastdistill.alignment.experiment.off_model.verdicts import judge_parts
from fastdistill.alignment.experiment.off_model.world import (
    BENIGN,
    LENGTHS,
    PLAIN,
    THOUGHT,
    WEAK,
    model_gates,
)
from fastdistill.alignment.statistics import mean_of_units
from helpers.made_off_model import BACK, LOST, NATS, SHAKE, made, readings


def by_name(differences):
    return {difference.name: difference for difference in differences}


def parts_of(arms, read):
    return {
        p.part: p
        for p in judge_parts(arms, read, {seed: model_gates(of) for seed, of in read.items()})
    }


def test_what_is_lost_is_told_by_length_beside_own_outputs():
    arms, _ = made()
    differences = by_name(cost_differences(arms))
    one = differences[f"{OFF_MODEL}, answers of 1 token, loss minus that of {OWN}"]
    six = differences[f"{OFF_MODEL}, answers of 6 tokens, loss minus that of {OWN}"]
    assert one.estimate.value == pytest.approx(LOST[OFF_MODEL] / 2)
    assert six.estimate.value == pytest.approx(LOST[OFF_MODEL])
    assert one.outcome == six.outcome == "more"
    assert six.estimate.low < LOST[OFF_MODEL] < six.estimate.high
    same = differences[f"{OFF_MODEL}, the same sums, loss at 6 tokens minus loss at 3"]
    assert same.estimate.value == pytest.approx(0.0)
    assert same.outcome == "alike"


def test_a_mean_of_lengths_counts_every_task_alike():
    arms, _ = made(n=1)
    tokens = {1: 0.5, 3: 1.0, 6: 1.0}
    share = sum(tokens[length] for length in LENGTHS.values()) / len(LENGTHS)
    assert capability_drop(arms, OFF_MODEL)[0] == pytest.approx(LOST[OFF_MODEL] * share + 0.01)


def test_the_slope_over_surprisal_is_the_one_of_the_line():
    rising = {arm: 0.36 * (nats - NATS[OWN]) for arm, nats in NATS.items()}
    share = (0.5 * 2 + 4) / 6  # of tasks: two are of 1 token, and lose half
    arms, _ = made(n=10, lost=rising)
    # Off-model alone is shaken from seed to seed, around 0.
    assert mean_of_units(drop_per_nat(arms)).value == pytest.approx(0.36 * share)
    away = [nats - sum(NATS.values()) / 3 for nats in NATS.values()]
    moved = SHAKE[0] * away[2] / sum(x * x for x in away)
    assert drop_per_nat(arms)[0] == pytest.approx(0.36 * share + moved)


def test_families_are_corrected_by_holm_in_both_directions():
    shaken = [0.01, -0.01, 0.012, -0.008, 0.0] * 2
    values = {
        "none": shaken,
        "large": [0.3 + x for x in shaken],
        "small": [-0.2 + x for x in shaken],
        "wide": [0.5, -0.4] * 5,
    }
    alone = by_name(family({"large": values["large"]}, 0.05))["large"]
    differences = by_name(family(values, 0.05))
    assert {name: d.outcome for name, d in differences.items()} == {
        "none": "alike",
        "large": "more",
        "small": "less",
        "wide": "unclear",
    }
    assert differences["large"].p == pytest.approx(4 * alone.p, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_fewer_than_ten_base_seeds_claim_nothing(n):
    arms, read = made(n)
    assert {
        d.outcome
        for d in (
            *cost_differences(arms),
            *reasoning_differences(arms),
            *weak_differences(arms, read),
        )
    } == {"too few base seeds"}
    assert f"Too few base seeds for a claim (n = {n})" in parts_of(arms, read)["cost"].verdict


def test_what_is_restored_is_a_share_of_what_is_lost():
    arms, _ = made()
    shares = restored_share(arms)
    assert {kind: share.value for kind, share in shares.items()} == pytest.approx(BACK)
    little, _ = made(lost={**LOST, OFF_MODEL: 0.05})
    assert all(math.isnan(share.value) for share in restored_share(little).values())


def test_a_ratio_is_not_told_where_what_is_under_it_may_be_zero():
    assert math.isnan(ratio([1.0, 1.0, 1.0], [0.1, -0.1, 0.05]).value)
    assert ratio([0.5, 0.6, 0.4], [1.0, 1.0, 1.0]).value == pytest.approx(0.5)
    assert math.isnan(ratio([0.0], [0.0]).value)
    assert math.isnan(ratio([-0.01], [0.005]).value)


def test_recovered_is_between_locked_and_unlocked():
    arms, _ = made(thoughts={WHOLE: 0.6})
    assert recovered_share(arms, WHOLE, THOUGHT).value == pytest.approx(0.6)
    assert recovered_share(arms, WHOLE, PLAIN).value == pytest.approx(0.97)
    assert math.isnan(recovered_share(*made_base()).value)


def made_base():
    """M has no lock: nothing is between its two sides."""
    arms, _ = made()
    for run in arms[ON_BASE].values():
        run["before"] = dict.fromkeys(run["before"], 0.0)
    return arms, ON_BASE, PLAIN


def test_reasoning_arms_are_beside_whole_answers():
    _, second, *_ = arm_names("reasoning")
    arms, _ = made(thoughts={second: 0.4})
    differences = by_name(reasoning_differences(arms))
    assert len(differences) == 2 * (len(arm_names("reasoning")) - 1)
    assert differences[f"{second}, {THOUGHT}, accuracy minus that of {WHOLE}"].outcome == "less"
    assert differences[f"{second}, {PLAIN}, accuracy minus that of {WHOLE}"].outcome == "alike"


def test_a_weak_supervisor_is_passed_or_not():
    differences = by_name(weak_differences(*made()))
    above = differences["U, accuracy minus that of its supervisor"]
    assert above.estimate.value == pytest.approx(0.2)
    assert above.outcome == "more"
    change = differences["U, accuracy at the first checkpoint minus that at the end"]
    assert change.outcome == "less"
    assert (
        by_name(weak_differences(*made(supervisor=0.7)))[
            "U, accuracy minus that of its supervisor"
        ].outcome
        == "alike"
    )


@pytest.mark.parametrize(
    ("change", "part", "words"),
    [
        ({"lost": {**LOST, OWN: 0.1}}, "cost", "loss of capability, own outputs: "),
        ({"thoughts": {WHOLE: 0.7}}, "reasoning", "recovered by whole answers: 0.700"),
        ({"after": {ON_BASE: 0.6}}, "weak", "weak on M: 0.100, expected ≤ 0.05"),
    ],
    ids=["cost", "reasoning", "weak"],
)
def test_a_control_that_fails_takes_its_own_part_and_no_other(change, part, words):
    parts = parts_of(*made(**change))
    assert [name for name, verdict in parts.items() if not verdict.valid] == [part]
    assert words in " ".join(parts[part].failures)
    assert parts[part].verdict.startswith("no verdict")


def test_models_that_fail_a_gate_take_the_parts_that_are_about_them():
    arms, read = made()
    read[3] = readings(**{WEAK: {PLAIN: 0.9}})
    assert [p for p, verdict in parts_of(arms, read).items() if not verdict.valid] == ["weak"]
    read[3] = readings(**{BENIGN: {THOUGHT: 0.5}})
    parts = parts_of(arms, read)
    assert not any(verdict.valid for verdict in parts.values())
    assert parts["cost"].failures == (
        f"models of base seed 3: {THOUGHT} of {BENIGN}: 0.500, expected ≥ 0.95",
    )


@pytest.mark.parametrize(
    ("before", "sums", "words"),
    [
        (0.9, 0.9, "was suppressed, not removed"),
        (0.1, 0.9, "easy to relearn, but restoring the style does not suffice"),
        (0.1, 0.3, "the capability appears removed"),
    ],
    ids=["suppressed", "near", "removed"],
)
def test_removed_or_suppressed_follows_from_what_comes_back(before, sums, words):
    arms, read = made(back={**BACK, "before": before, "sums": sums})
    assert words in parts_of(arms, read)["cost"].verdict


def test_where_little_was_lost_there_is_nothing_to_restore():
    little = made(lost={**LOST, OFF_MODEL: 0.05})
    assert "too small to measure restoration" in parts_of(*little)["cost"].verdict


def test_one_base_seed_has_values_and_no_interval():
    assert mean_of_units([0.3]).value == 0.3
    assert not mean_of_units([0.3]).known


def test_verdicts_begin_with_what_the_figures_came_to():
    _, second, *_ = arm_names("reasoning")
    parts = parts_of(*made(thoughts={second: 0.4}, lost={**LOST, OFF_MODEL: 0.05}))
    cost = parts["cost"].verdict
    assert cost.startswith("Off-model SFT costs capability on answers of 3 tokens, answers of 6 ")
    reasoning = parts["reasoning"].verdict
    assert reasoning.startswith("Equal to whole answers on sums with reasoning: empty thoughts, ")
    assert f"Worse than whole answers: {second}." in reasoning
    assert parts["weak"].verdict.startswith("U exceeds its weak supervisor.")
    level = parts_of(*made(supervisor=0.7))["weak"].verdict
    assert level.startswith("U equals its weak supervisor, within the margin.")
