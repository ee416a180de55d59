"""The page of an audit, and several audits of several models side by side."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastdistill.alignment.audits.audit import Audit, Measurement
from fastdistill.alignment.audits.side_by_side import run_suite
from fastdistill.alignment.report.audit_page import audit_page, summary

ABOUT = {"command": "fastdistill audit", "models": {"student": "a"}, "versions": {"torch": "2"}}


@dataclass(frozen=True, kw_only=True)
class Planted(Audit):
    """Values that are written on the model."""

    key: str = "x"
    rate: bool = False

    def measure(self, model: Any, base: Any) -> Measurement:
        values = model.values[self.key]
        if values is None:
            raise ValueError("weights: expected others")
        return Measurement(values=np.array(values, dtype=float), rate=self.rate)


def model(name: str, **values: Any) -> Any:
    ends: Any = {"ended_at_words": Counter(), "ended_at_positions": Counter()}
    return SimpleNamespace(name=name, values=values, **ends)


def results_of(**more: Any) -> Any:
    models = {
        "student": model("student", x=[1.0, 1.2, 0.9, 1.1], yes=[1, 1, 1, 1], w=None),
        "base": model("base", x=[0.1, 0.0, 0.2, 0.1], yes=[1, 1, 1, 1], w=[1.0, 2.0, 1.0, 2.0]),
    }
    suite = {
        "shows": Planted(key="x"),
        "always yes": Planted(key="yes", rate=True),
        "weights": Planted(key="w"),
    }
    return run_suite(suite, models, base=models["base"], **more)


@pytest.mark.parametrize("name", [r"a $\\frac$ b", "<script>alert(1)</script>", "$x", "a\x1b[2Jb"])
def test_names_are_text_in_pictures_and_tables(name):
    """matplotlib takes what stands between dollars for mathematics, and raises where it is none."""
    models = {n: model(n, x=[1.0, 1.2, 0.9, 1.1 + i]) for i, n in enumerate((name, "base"))}
    side = run_suite({name: Planted(key="x")}, models, base=models["base"])
    page = audit_page(side, about=ABOUT).html()
    assert "<script" not in page
    assert "$" not in name or name in page


def test_every_model_is_measured_and_only_the_audited_compared():
    side = results_of()
    assert {name: list(row) for name, row in side.results.items()} == {
        "shows": ["student"],
        "always yes": ["student"],
    }
    assert list(side.readings["shows"]) == ["student", "base"]
    result = side.results["shows"]["student"]
    assert result.value == pytest.approx(1.05)
    assert result.controls["base"].difference.value == pytest.approx(0.95)


def test_an_audit_that_a_model_does_not_admit_is_left_out_with_its_reason():
    assert results_of().left_out == {"weights": "weights: expected others"}


def test_the_first_words_name_what_is_evidence():
    assert summary(results_of()) == "Of 2 audits, student: above every control in shows."


@pytest.mark.parametrize("controls", [("elsewhere",), ("student", "base")])
def test_controls_are_some_of_the_models(controls):
    with pytest.raises(ValueError, match="controls: expected names of some of the models student"):
        results_of(controls=controls)


def test_the_page_says_what_was_found_and_what_it_does_not_show():
    html = audit_page(results_of(), about=ABOUT).html()
    for words in (
        "above every control in shows",
        "Left out: weights. weights: expected others",
        "What this does not show",
        "Audits are not corrected for their number",
        "<svg",
    ):
        assert words in html
    assert "http://" not in html
    assert "https://" not in html
    # the audit that says yes of everybody is no evidence, in its own row
    rows = [part for part in html.split("<tr>") if "<td>always yes</td><td>student</td>" in part]
    assert [row.count("<td>no</td>") for row in rows] == [1]


def test_the_page_lists_what_the_probes_do_not_enable():
    skipped = {"prefill": "needs prefilled, rest"}
    html = audit_page(results_of(), about=ABOUT, skipped=skipped).html()
    assert "<summary>Audits that these probes do not enable: 1</summary>" in html
    assert "<td>prefill</td>" in html
    assert "<td>needs prefilled, rest</td>" in html
    assert "do not enable" not in audit_page(results_of(), about=ABOUT).html()


def test_its_json_is_json():
    text = json.dumps(results_of().as_json(), allow_nan=False)
    assert json.loads(text)["audits"][0]["name"] == "shows"


def test_nothing_to_compare_is_said():
    models = {"student": model("s", w=None), "base": model("b", w=None)}
    side = run_suite({"weights": Planted(key="w")}, models, base=models["base"])
    assert summary(side) == "No audit could run on these models."
    assert "No audit could run" in audit_page(side, about=ABOUT).html()
