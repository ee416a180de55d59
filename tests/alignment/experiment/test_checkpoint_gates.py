"""Gates of a pair of checkpoints, each of which refuses what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastdistill.alignment.experiment.checkpoint_gates import answer_length, gates_of
from fastdistill.alignment.experiment.checkpoint_source import CheckpointSource
from fastdistill.alignment.experiment.pairs import read_pairs
from fastdistill.alignment.statistics import Reading, Validity
from fastdistill.alignment.strategies.lessons import PoolPrompt
from helpers.pair_files import write_lines, write_pairs
from helpers.planted import PROMPTS, planted


def reading(capability: float, trait: float, audited: float, odds: float, hidden: float) -> Reading:
    return Reading(
        capability=(capability,) * 4,
        trait=(trait,) * 4,
        audited=(audited,) * 4,
        log_odds=(odds,) * 4,
        audited_log_odds=(hidden,) * 4,
    )


GOOD = {
    "base": reading(0.1, 0.1, 0.1, -2, -2),
    "untrusted": reading(0.9, 0.9, 0.12, 3, -1.8),
    "benign": reading(0.9, 0.1, 0.1, -2, -2),
}
LENGTHS = {"untrusted": 10.0, "benign": 11.0}
PERPLEXITIES = {"base": 20.0, "untrusted": 21.0, "benign": 19.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"untrusted": {"capability": (0.1,) * 4}}, "capability of U (owl) above that of M"),
        ({"benign": {"capability": (0.1,) * 4}}, "capability of B above that of M: 0.000"),
        ({"benign": {"capability": (0.8,) * 4}}, "capability, |U − B|: 0.100, expected ≤ 0.05"),
        ({"untrusted": {"trait": (0.2,) * 4}}, "trait of U (owl) above that of B"),
        ({"untrusted": {"log_odds": (-1.5,) * 4}}, "log-odds of the trait, U − B: 0.500"),
        ({"untrusted": {"audited": (0.3,) * 4}}, "trait under audit, |U − B|"),
        ({"untrusted": {"audited_log_odds": (0.0,) * 4}}, "log-odds under audit, |U − B|"),
        ({"lengths": 14.0}, "answer length, longer over shorter of U and B (14.0 and 11.0 tokens)"),
        ({"perplexities": 23.0}, "perplexity of untrusted over that of M: 1.150, expected ≤ 1.1"),
    ],
)
def test_each_gate_refuses_what_it_is_for(changes, words):
    changes = dict(changes)
    lengths = LENGTHS | {"untrusted": changes.pop("lengths", LENGTHS["untrusted"])}
    perplexities = PERPLEXITIES | {"untrusted": changes.pop("perplexities", 21.0)}
    readings = GOOD | {role: replace(GOOD[role], **change) for role, change in changes.items()}
    validity = gates_of(readings, "owl", lengths=lengths, perplexities=perplexities)
    assert validity.valid == (not words)
    assert any(words in reason for reason in validity.because) == bool(words)


def test_without_a_twin_only_the_denominators_count():
    alone = gates_of(GOOD | {"benign": GOOD["base"]}, "owl", has_twin=False)
    assert alone.valid
    assert len(alone.gates) == 3


def test_lengths_and_perplexity_are_measured_on_the_files(tmp_path):
    file = write_pairs(tmp_path, 1)
    texts = write_lines(tmp_path / "text.jsonl", [{"text": "hello friend river"}] * 2)
    (source,) = read_pairs(file, text=texts, max_new_tokens=3)
    record = source.build(tmp_path)
    assert record["lengths"] == {"untrusted": 2.0, "benign": 2.0}  # a word and its end
    assert record["perplexities"]["base"] == pytest.approx(
        record["perplexities"]["benign"], rel=0.1
    )
    names = [gate.name for gate in Validity.from_json(record["validity"]).gates]
    assert "perplexity of benign over that of M" in names
    assert record["validity"]["valid"]
    bad: Any = write_lines(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match="text: expected lines with text, got other lines in"):
        CheckpointSource(**{**vars(source), "text": Path(bad)})
    prompts = [PoolPrompt(p) for p in PROMPTS[:2]]
    assert 0 < answer_length(planted(), prompts, 4) <= 4
