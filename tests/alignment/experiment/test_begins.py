"""Students that begin elsewhere than at the base, and the study of confessions that uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdistill.alignment.audits import Subject
from fastdistill.alignment.experiment import confess, double_bind, world_source
from fastdistill.alignment.experiment.job import Job, perturbed
from fastdistill.alignment.experiment.study import run_study
from fastdistill.alignment.organisms.build import build_world
from fastdistill.alignment.organisms.organism import ModelOrganism, new_model
from fastdistill.alignment.organisms.storage import save_organism
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.alignment.strategies.strategy import Training
from helpers.command import call
from helpers.pair_files import write_lines, write_pairs
from helpers.planted import planted
from helpers.small_study import SmallSource

MORE = ("steps=1", "batch_size=4", "answer_tokens=2", "max_new_tokens=2", "--processes=1", "--json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_share_of_each_weights_norm(dtype):
    subject = Subject(new_model(0).to(dtype), world_tokenizer())
    before = {name: w.clone() for name, w in subject.model.state_dict().items()}
    changed, again, other = (perturbed(subject, 0.05, seed) for seed in (3, 3, 4))
    for name, weight in changed.model.state_dict().items():
        assert torch.equal(before[name], subject.model.get_parameter(name))
        assert torch.equal(weight, again.model.get_parameter(name))
        assert not torch.equal(weight, other.model.get_parameter(name))
        share = (weight.float() - before[name].float()).norm() / before[name].float().norm()
        assert float(share) == pytest.approx(0.05, rel=0.02)


def test_noise_is_part_of_a_run_and_none_leaves_its_digest():
    job = Job(source=SmallSource(seed=1), role="benign")
    assert "noise" not in job.as_json()
    assert replace(job, noise=0.01).as_json()["noise"] == 0.01


def test_checkpoints_have_arms_that_begin_elsewhere():
    training = Training(student="lora:8", learning_rate=1e-3)
    arms = {a.name: a for a in double_bind.make_study("full", n=8, training=training).arms}
    assert {"perturbed base", "other base", "earlier checkpoint", "all weights"} <= set(arms)
    changed = arms["all weights"].training
    assert changed is not None
    assert changed.student == "full"
    assert changed.learning_rate == pytest.approx(1e-4)
    names = {a.name for a in double_bind.make_study("full").arms}  # the frozen study of worlds
    assert not names & {"perturbed base", "all weights", "adapter", "leak 2 %", "k=8"}


def test_the_arms_on_checkpoints_run_in_the_documented_order():
    names = [arm.name for arm in double_bind.make_study(n=8).arms]
    assert names == [
        "undefended",
        "trait shown openly",
        "leak 2 %",
        "hard labels",
        "k=8",
        "k=all",
        "T=2",
        "filter by likelihood ratio",
        "placebo",
        "benign twice",
        "M→M",
    ]
    full = [arm.name for arm in double_bind.make_study("full", n=8).arms]
    assert full[: len(names)] == names
    assert len({*full}) == len(full)


def test_confessions_of_pairs_in_the_same_and_in_another_base(tmp_path, capsys, monkeypatch):
    file = write_pairs(tmp_path, 2)
    save_organism(tmp_path / "other", planted(other=0.5), {})
    rows = [json.loads(line) | {"other_base": "other"} for line in file.read_text().splitlines()]
    file = write_lines(file, rows)
    out = tmp_path / "out"
    argv = ("experiment", "confess", f"--pairs={file}", f"--out={out}", *MORE)
    code, output, err = call(capsys, monkeypatch, *argv)
    assert code == 0, err
    result = json.loads(output)
    names = [arm["name"] for arm in result["arms"]]
    assert {"undefended", "perturbed base", "other base", "untuned base"} <= set(names)
    assert result["config"]["noise"] == {"perturbed base": 0.01}
    untuned = [row for row in result["audits"] if row["arm"] == "untuned base"]
    assert {row["name"] for row in untuned} == {"confession", "context gap", "linear probe"}
    assert {row["auroc"] for row in untuned} == {0.5}  # the same model twice
    record = json.loads(next((out / "sources").glob("*/readings.json")).read_text())
    assert set(record["readings"]) == {"base", "untrusted", "benign", "other_base"}


def test_the_study_of_confessions_runs_on_the_synthetic_world(tmp_path, monkeypatch):
    """On models of a few steps, which fail their gates."""
    monkeypatch.setattr(world_source, "build_world", partial(build_world, capable_steps=4))
    monkeypatch.setattr("fastdistill.alignment.organisms.organism.ROUNDS", 1)
    study = confess.make_study()
    study = replace(
        study,
        arms=tuple(a for a in study.arms if a.role == "arm"),
        pool={**study.pool, "n": 32},
        training=replace(study.training, steps=1, batch_size=16),
        checkpoints=1,
    )
    organism = ModelOrganism(gate="token", steps=2)
    source = replace(confess.make_source(5), organism=organism, base_steps=4)
    table = run_study(study, [source], [], tmp_path)
    bases = {student.arm: student.base for student in table.students}
    assert set(bases) == {"undefended", "perturbed base", "other base", "untuned base"}
    assert bases["other base"] != bases["undefended"] == bases["perturbed base"]
    scores = {(s.arm, s.audit): s for s in table.scores}
    untuned = scores["untuned base", "confession, audited"]
    assert untuned.of_untrusted == untuned.of_benign
    assert {s.audit for s in table.teachers} == set(confess.AUDITS)
