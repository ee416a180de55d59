"""Contrasts with a reference arm on the same seeds, corrected bounds, and rules that stay fixed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.certification import certified
from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.rules import FILE, RULES, Rule
from fastdistill.alignment.experiment.study import run_study
from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.report.arms import LEAKING, SPREAD
from fastdistill.alignment.report.verdicts import outcome, summary, verdict
from fastdistill.alignment.statistics import holm, t_test
from fastdistill.alignment.statistics.hypothesis_tests import (
    certification_power,
    ratio_upper_bound,
)
from fastdistill.alignment.statistics.transfer import contrast, seed_gaps
from fastdistill.report.number_format import format_number
from fastdistill.runtime.intervals import student_t_quantile
from helpers.made_students import ABOUT, arm, controls
from helpers.report_page import Page
from helpers.small_study import SmallSource, small_study
from helpers.transfer_arms import arm as transfer_arm


@pytest.fixture(scope="module")
def report():
    students = [*arm("undefended", tau=0.5, spread=0.2), *controls()]
    students += [s for name, tau in (("less", 0.0), ("alike", 0.5)) for s in arm(name, tau=tau)]
    return TransferReport(
        students,
        about=ABOUT,
        reference="undefended",
        claimed=["less"],
        positive_control="copy of U",
        null_arms=["M to M"],
    )


def test_arms_are_compared_with_the_reference_on_the_same_seeds(report):
    arms = {a.name: a for a in report.arms}
    gaps = {
        name: seed_gaps([s for s in report._students if s.arm == name])
        for name in ("undefended", "less", "alike")
    }
    p_values = []
    for name in ("less", "alike"):
        paired = [gaps[name][s][0] - gaps["undefended"][s][0] for s in range(12)]
        denominator = np.mean([gap[1] for gap in gaps[name].values()])
        difference = arms[name].contrast.difference
        assert difference.value == pytest.approx(np.mean(paired) / denominator)
        assert difference.n == 12
        p_values.append(t_test(paired))
    adjusted = [arms[name].contrast.p for name in ("less", "alike")]
    assert adjusted == pytest.approx(holm(p_values))
    assert [arms[name].compared for name in ("less", "alike")] == ["less", "unclear"]
    for name in ("undefended", "copy of U", "M to M"):
        assert arms[name].contrast is None
    rows = {row["name"]: row for row in report.table()}
    assert rows["less"]["contrast"] == arms["less"].contrast.difference.value
    assert rows["less"]["contrast_p_holm"] == adjusted[0]
    assert rows["undefended"]["contrast"] is rows["undefended"]["contrast_p_holm"] is None


def test_only_common_seeds_are_paired():
    ours, theirs = arm("a", seeds=4), arm("b", seeds=4, first=2)
    assert contrast(ours, theirs).difference.n == 2
    alone = contrast(ours, arm("b", seeds=1, first=3))
    assert not alone.difference.known
    assert alone.p is None
    apart = contrast(ours, arm("b", seeds=4, first=9))
    assert math.isnan(apart.difference.value)
    assert apart.p is None


def test_a_contrast_of_few_seeds_is_unclear():
    few = [*arm("plain", tau=0.9, seeds=5), *arm("less", tau=0.0, seeds=5)]
    made = TransferReport(few, about=ABOUT, reference="plain")
    assert made.table()[1]["contrast_p_holm"] < 0.01
    less = made.arms[1]
    assert less.compared == "unclear"


def test_the_page_answers_the_paired_question(report, tmp_path):
    page = Page(report.to_html(tmp_path / "report.html"))
    tau = format_number(report.arms[0].tau.value)
    assert (
        f"Compared with undefended (τ {tau}) on the same 12 base seeds, 1 (less) acquires "
        "significantly less of the trait and none significantly more." in page.text
    )
    assert "On the same seeds, τ minus that of the reference is −" in page.text
    for words in ("hold at once for the arms that may be certified: less.", "of .18, which the"):
        assert words in page.text
    power = certification_power(SPREAD, 12)
    assert f"with a true τ of 0 is certified in {power:.0%} of studies" in page.text


def test_an_arm_outside_the_rule_is_not_certified():
    clean = transfer_arm((0.97, 0.94, 0.99), (0.01, -0.04, 0.06), p=0.7)
    assert outcome(clean, True) == "DFC succeeds"
    outside, above = replace(clean, bound=None), replace(clean, bound=0.11)
    for other, short, words in (
        (outside, "within the margin", "The rule does not name this arm among those that may be"),
        (above, "unclear", "The upper 95 % bound of τ is .11, corrected over arms, which is above"),
        (
            replace(transfer_arm((0.2, 0.1, 0.3), (0.01, -0.04, 0.06), p=0.7), bound=None),
            "capability lost",
            "does not keep",
        ),
        (
            replace(transfer_arm((0.97, 0.94, 0.99), (0.05, 0.0, 0.11), p=0.7), bound=None),
            "unclear",
            "is unclear: τ .05",
        ),
    ):
        assert outcome(other, True) == short
        assert words in verdict(other, True)
    assert "1 is within the margin but not named by the rule (an arm)" in summary([outside], [])


def test_bounds_are_corrected_over_the_arms_that_may_be_certified():
    students = [s for name in "abc" for s in arm(name, tau=0.0, spread=0.1)]
    alone, three = (
        TransferReport(students, about=ABOUT, claimed=claimed).arms[0].bound
        for claimed in (["a"], [])
    )
    units = np.array([*seed_gaps(arm("a", tau=0.0, spread=0.1)).values()])
    assert alone == ratio_upper_bound(units)
    assert three == ratio_upper_bound(units, 0.05 / 3) > alone


def test_a_bound_with_a_fixed_denominator_is_that_of_a_mean():
    x = np.random.default_rng(0).normal(size=9)
    error = x.std(ddof=1) / 3
    units = np.stack([x, np.full(9, 2.0)], axis=1)
    expected = (x.mean() + student_t_quantile(0.99, 8) * error) / 2
    assert ratio_upper_bound(units, 0.01) == pytest.approx(expected)
    assert math.isnan(ratio_upper_bound(units[:1]))
    assert math.isnan(ratio_upper_bound(units[:, ::-1] * [1, 0.01]))  # the denominator may be 0


@pytest.mark.parametrize("name", RULES)
def test_rules_certify_clean_arms_and_not_leaking_ones(name):
    """Simulated studies; `python -m benchmarks.certification` has more of them."""
    rule = RULES[name]
    clean, _ = certified(rule, 0.0, SPREAD, 300)
    assert clean >= 0.7
    power = certification_power(SPREAD, rule.n, alpha=0.05 / len(rule.claimed))
    assert clean == pytest.approx(power, abs=0.08)
    assert certified(rule, LEAKING, SPREAD, 300)[1] <= 0.05


def test_a_rule_that_changed_after_the_first_run_is_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastdistill.alignment.experiment.study.build_models", lambda *a: calls.append(1)
    )
    monkeypatch.setattr(
        "fastdistill.alignment.experiment.study.select_seeds", lambda *a: 1 / 0
    )  # after the rule is stored
    sources = [SmallSource(seed=1001)]
    rule = Rule(n=1, first_seed=1001).as_json()

    def start(rule, folder=tmp_path, **execution):
        with pytest.raises(ZeroDivisionError):
            run_study(
                small_study(), sources, [], folder, rule=rule, execution=Execution(**execution)
            )

    start(rule, only_report=True)
    assert not (tmp_path / FILE).exists()
    start(rule)
    start(rule, only_report=True)
    begun = len(calls)
    for changed in ({"n": 2}, {"safe": 0.2}, {"claimed": ["plain"]}, {"method": 2}):
        with pytest.raises(ValueError, match="rule: expected that of the first run in"):
            run_study(small_study(), sources, [], tmp_path, rule=rule | changed)
    assert len(calls) == begun
    old = tmp_path / "old"
    (old / "sources" / "small-1001").mkdir(parents=True)
    (old / "sources" / "small-1001" / "readings.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out: expected rule\.json, which is written before"):
        run_study(small_study(), sources, [], old, rule=rule)
