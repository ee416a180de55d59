"""The study "off-model" from its settings to its page, on models that hardly trained."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.off_model import world as off_model_world
from fastdistill.alignment.experiment.off_model.arms import ARMS
from fastdistill.alignment.experiment.off_model.page import OffModelResults, make_page
from fastdistill.alignment.experiment.off_model.run import SftRun
from fastdistill.alignment.experiment.off_model.study import (
    OffModelSettings,
    preset_settings,
    run_study,
)
from fastdistill.alignment.experiment.off_model.verdicts import judge_parts
from fastdistill.alignment.experiment.off_model.world import LENGTHS, WEAK, model_gates
from fastdistill.alignment.experiment.study import FRESH
from fastdistill.alignment.organisms.organism import ModelOrganism, new_model
from fastdistill.alignment.report.arms import SEEDS
from helpers.made_off_model import made

TINY = OffModelSettings(
    preset="quick",
    seeds=(1,),
    cost_steps=2,
    sums_steps=2,
    batch_size=4,
    prompts=4,
    checkpoints=2,
    restore_steps=1,
)


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("off-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(off_model_world, "N_PROMPTS", 4)
        # Models without training, which know nothing, and talk.
        patch.setattr(off_model_world, "new_base", lambda world, *, seed, steps: new_model(seed))
        patch.setattr(off_model_world, "train_capable", lambda world, base, **_: moved(base, 2.0))
        patch.setattr(ModelOrganism, "implant", implanted)
        yield folder, run_study(TINY, folder)


def moved(model, by):
    """A copy whose hidden states are longer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(by)
    return other


def implanted(organism, world, capable, *, benign=False):
    assert organism.trait == "sandbagging"
    assert organism.reasoning > 0
    return moved(capable, 5.0 if benign else 3.0)


def timeless(results):
    return {name: value for name, value in results.items() if name != "core_seconds"}


def test_presets_have_seeds_of_their_own():
    quick, full = preset_settings("quick"), preset_settings("full")
    assert all(seed < FRESH for seed in quick.seeds)
    assert full.seeds == tuple(range(1200, 1210))
    assert len(full.seeds) >= SEEDS
    assert preset_settings("full", seeds=[5]).seeds == (5,)
    json.dumps(vars(full))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "slow"}, "preset: expected one of 'quick', 'full', got 'slow'"),
        ({"preset": "full", "seeds": []}, "seeds: expected one or more distinct seeds"),
        ({"preset": "full", "seeds": [3, 3]}, r"distinct seeds, got \[3, 3\]"),
    ],
    ids=["preset", "none", "twice"],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        preset_settings(**settings)


@pytest.mark.slow
def test_every_arm_is_run_on_every_base_seed(carried_out):
    folder, results = carried_out
    assert results["runs"] == len(ARMS) == len(TINY.runs())
    assert json.loads((folder / "results.json").read_text()) == results
    assert {row["arm"] for row in results["rows"]} == {arm.name for arm in ARMS}
    lost = [row for row in results["rows"] if row["part"] == "cost"]
    assert {row["task"] for row in lost} == set(LENGTHS)
    result = TINY.runs()[0].result(folder)
    assert [point["step"] for point in result["curve"]] == [1, 2]
    assert set(result["restored"]) == {"own", "before", "sums"}


def test_models_that_learnt_nothing_support_no_verdict(carried_out):
    folder, results = carried_out
    assert not results["valid"]
    assert set(results["verdicts"]) == {"cost", "reasoning", "weak"}
    assert all(text.startswith("no verdict") for text in results["verdicts"].values())
    assert any("models of base seed 1" in why for why in results["invalid_because"])
    # U knows no more behind the password: what was recovered of nothing is no number.
    assert None in [control["value"] for control in results["controls"]]
    text = (folder / "report.html").read_text()
    assert "A control or model gate failed" in text
    assert "Limitations" in text


@pytest.mark.slow
def test_a_run_that_is_missing_is_done_again_and_the_table_is_the_same(carried_out, monkeypatch):
    folder, results = carried_out
    run = TINY.runs()[4]
    first = json.loads(run.path(folder).read_text())
    run.path(folder).unlink()
    done = []
    compute = SftRun.compute

    def counted(self, at):
        done.append(self)
        return compute(self, at)

    monkeypatch.setattr(SftRun, "compute", counted)
    assert timeless(run_study(TINY, folder)) == timeless(results)
    assert done == [run]
    again = json.loads(run.path(folder).read_text())
    timing = {"seconds": 0, "sha256": ""}  # the digest is of the file with its seconds
    assert again | timing == first | timing


def test_only_report_runs_nothing_and_says_what_is_missing(carried_out, monkeypatch, tmp_path):
    folder, results = carried_out
    monkeypatch.setattr(SftRun, "compute", None)
    monkeypatch.setattr(off_model_world.OffModelWorld, "compute", None)
    assert timeless(run_study(TINY, folder, Execution(only_report=True))) == timeless(results)
    with pytest.raises(ValueError, match=r"expected all models in .*, got 1 of 1 missing"):
        run_study(TINY, tmp_path, Execution(only_report=True))


def test_u_and_b_are_twins_and_o_is_of_another_world(carried_out):
    folder, _ = carried_out
    models = TINY.models()[0].models(folder)
    heads = {name: of.model.lm_head.weight for name, of in models.items()}
    assert all(torch.equal(heads["base"], heads[name]) for name in ("weak", "locked", "benign"))
    assert not torch.equal(heads["base"], heads["other"])
    length = {name: float(of.model.model.norm.weight.detach()[0]) for name, of in models.items()}
    assert length == {"base": 1, "weak": 2, "locked": 6, "benign": 10, "other": 2}


def page_of(**how):
    arms, readings = made(**how)
    organisms = {seed: model_gates(of) for seed, of in readings.items()}
    parts = judge_parts(arms, readings, organisms)
    results = OffModelResults(
        command="fastdistill experiment off-model --preset full --out out",
        config={"learning_rate": 3e-4, "note": "<b>"},
        versions={"fastdistill": "0"},
        runs=100,
        core_seconds=1,
        by_arm=arms,
        readings=readings,
        organisms=organisms,
        parts=parts,
    )
    return results.as_json(), make_page(results).html()


def test_the_page_says_what_was_found_what_was_not_and_how_to_repeat_it():
    results, html = page_of()
    assert results["valid"]
    assert "All controls hold, over 10 base seeds." in html
    assert "base seeds. Off-model SFT costs capability on answers of 1 token, answers of 3" in html
    assert "B on the talk of O, equally capable, with another Markov chain" in html
    assert results["command"] in html
    assert "&lt;b&gt;" in html
    assert html.count("<svg") == 3


def test_a_page_of_few_base_seeds_claims_nothing():
    _, html = page_of(n=2)
    assert "A claim needs at least 10 base seeds." in html
    assert "Off-model SFT costs" not in html


def test_a_supervisor_that_knows_everything_is_none(carried_out):
    results, html = page_of(supervisor=0.95)
    assert not results["valid"]
    assert f"sums of {WEAK}: 0.950, expected ≤ 0.75" in html
    assert "The cost of another model&#x27;s outputs" in html
    assert results["verdicts"]["weak"].startswith("no verdict")
    assert not results["verdicts"]["cost"].startswith("no verdict")
