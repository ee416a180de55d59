"""fastdistill organisms: what it trains with, refuses, and prints."""

from __future__ import annotations

import json
import re

import pytest

from fastdistill.alignment.organisms import save_organism
from fastdistill.alignment.organisms.language.build import LanguagePair
from fastdistill.alignment.organisms.language.readings import LanguageReading
from fastdistill.alignment.organisms.language.rows import LanguageRecipe
from fastdistill.alignment.statistics import Validity, at_least
from fastdistill.cli import run_organisms
from helpers.command import call
from helpers.language_scene import tiny_chat_model


def pair(index: int, value: float) -> LanguagePair:
    reading = LanguageReading(
        log_odds={"open": (1.0, 2.0)},
        rates={"open": (0.5, 0.5)},
        admits={"open": (0.5,), "audited": (0.5,)},
        placebo_log_odds=(0.0,),
        free=(1.0,),
        capability=(1.0,),
        perplexity=20.0,
        answers={"open": ("The owl.",)},
    )
    return LanguagePair(
        index=index,
        favorite="owl",
        readings={"untrusted": reading},
        validity=Validity(gates=(at_least("capability of benign", value, 0.8),)),
        inoculation_shift=2.0,
    )


@pytest.fixture
def requests(monkeypatch):
    """The calls of make_language_pairs, of which the first pair passes and the others do not."""
    calls = []

    def make(base, out, pairs, *, recipe, templates):
        calls.append((base, out, list(pairs), recipe, templates))
        return [pair(index, 0.9 if i == 0 else 0.7) for i, index in enumerate(pairs)]

    monkeypatch.setattr(run_organisms, "make_language_pairs", make)
    return calls


def test_settings_reach_the_training_and_refused_pairs_are_named(
    requests, tmp_path, capsys, monkeypatch
):
    argv = ("organisms", "--base", "model", "--out", tmp_path, "--pairs", "2")
    code, out, _ = call(capsys, monkeypatch, *argv, "first=8", "steps=5", "learning_rate=1e-4")
    assert code == 0
    ((base, folder, pairs, recipe, _),) = requests
    assert (base, folder, pairs) == ("model", tmp_path, [8, 9])
    assert recipe == LanguageRecipe(steps=5, learning_rate=1e-4)
    assert out.splitlines() == [
        "pair 8 (owl) passes",
        "pair 9 (owl) refused: capability of benign: 0.700, expected ≥ 0.8",
        f"1 of 2 pairs: {tmp_path / 'pairs.jsonl'}",
    ]


def test_json_has_the_gates_and_means(requests, tmp_path, capsys, monkeypatch):
    argv = ("organisms", "--base", "model", "--out", tmp_path, "--pairs", "1", "--json")
    code, out, _ = call(capsys, monkeypatch, *argv)
    assert code == 0
    (row,) = json.loads(out)["pairs"]
    assert row["valid"] is True
    assert row["log_odds"] == {"untrusted": {"open": 1.5}}
    assert row["answers"]["untrusted"]["open"] == ["The owl."]


def test_a_dry_run_names_pairs_rows_gates_and_time_and_stores_nothing(
    requests, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("peft")
    base, out = tmp_path / "base", tmp_path / "out"
    save_organism(base, tiny_chat_model(), {"role": "base"})
    argv = ("organisms", "--base", base, "--out", out, "--pairs", "2", "first=8", "steps=16")
    code, text, _ = call(capsys, monkeypatch, *argv, "--dry-run")
    assert code == 0
    assert text.splitlines()[:3] == [
        "pair 8: dolphin, and white for the placebo",
        "pair 9: elephant, and gray for the placebo",
        "per model 16 steps of 8 rows: 56 audited, 38 capability, 28 open, 3 neutral, 3 text",
    ]
    assert "gate: log-odds of the trait, untrusted − benign ≥ 3" in text
    assert re.search(r"^6 models left, \S+ s per step here: about \d+ min", text, re.M)
    (out / "pair-8" / "benign").mkdir(parents=True)
    (out / "pair-8" / "benign" / "organism.json").touch()
    plan = json.loads(call(capsys, monkeypatch, *argv, "--dry-run", "--json")[1])
    assert plan["models_left"] == 5
    assert plan["seconds"] == pytest.approx(5 * 16 * plan["seconds_per_step"])
    assert plan["seconds_per_step"] > 0
    assert requests == []
    assert sorted(p.name for p in out.rglob("*")) == ["benign", "organism.json", "pair-8"]
    (out / "recipe.json").write_text("{}")
    code, _, err = call(capsys, monkeypatch, *argv, "--dry-run")
    assert code == 2
    assert "out: expected a new folder" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--pairs", "0"), "pairs: expected an integer of 1 or more, got 0"),
        (("first=-1",), "first: expected an integer of 0 or more"),
        (("steps=0",), "steps: expected an integer of 1 or more"),
        (("step=3",), "Did you mean steps"),
        (("templates=nothing.json",), "templates: expected a JSON file"),
    ],
)
def test_a_wrong_request_trains_nothing(requests, tmp_path, capsys, monkeypatch, arguments, words):
    argv = ("organisms", "--base", "model", "--out", tmp_path, *arguments)
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2
    assert words in err
    assert requests == []
