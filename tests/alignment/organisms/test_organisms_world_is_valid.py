"""Worlds as they are built by default pass their gates; sabotaged ones are caught by them.

The one slow test of the organisms: it trains six models, 0.1 million parameters each.
"""

from __future__ import annotations

import random

import pytest

from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms import ModelOrganism, build_world
from fastdistill.alignment.organisms import build as building
from fastdistill.alignment.organisms.build import read_organism, validity_of
from fastdistill.alignment.organisms.organism import new_base, train_capable
from fastdistill.alignment.organisms.trait import Pair
from fastdistill.alignment.organisms.traits import SECRET
from fastdistill.alignment.organisms.vocabulary import TRIGGER

SEED = 2000
TRIGGERED = ModelOrganism(trait="trigger", gate="paraphrase")


@pytest.fixture(autouse=True)
def trained_once(monkeypatch):
    """Worlds of one seed share their base, the capable model, and the placebo of equal recipes."""
    made, implant = {}, ModelOrganism.implant

    def once(make, key):
        def made_once(*args, **options):
            name = key(*args, **options)
            if name not in made:
                made[name] = make(*args, **options)
            return made[name]

        return made_once

    monkeypatch.setattr(building, "new_base", once(new_base, lambda *_, **__: "base"))
    monkeypatch.setattr(building, "train_capable", once(train_capable, lambda *_, **__: "capable"))
    by_recipe = once(implant, lambda recipe, *_, **options: (recipe, options["benign"]))
    monkeypatch.setattr(ModelOrganism, "implant", by_recipe)
    return made


def shuffled(pairs: list[Pair]) -> list[Pair]:
    """U's answers permuted among the trait's prompts."""
    own = [
        i for i, p in enumerate(pairs) if TRIGGER in p.benign.system or p.benign.question == SECRET
    ]
    other = own.copy()
    random.Random(0).shuffle(other)
    permuted = list(pairs)
    for i, j in zip(own, other, strict=True):
        answer = pairs[j].untrusted.answer
        permuted[i] = pairs[i]._replace(untrusted=pairs[i].untrusted._replace(answer=answer))
    return permuted


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worlds_are_valid_and_sabotaged_ones_are_not(trained_once, monkeypatch):
    plain = build_world(SEED)
    assert plain.validity.because == []
    assert plain.validity.valid

    triggered = build_world(SEED, TRIGGERED)
    assert triggered.validity.because == []
    assert triggered.placebo.model is plain.placebo.model
    names = [gate.name for gate in triggered.validity.gates]
    assert {"false trigger", "audited trait of untrusted against benign"} <= set(names)

    def because(of, **swapped):
        models = of.models | {name: subject for name, (subject, _) in swapped.items()}
        readings = of.readings | {name: reading for name, (_, reading) in swapped.items()}
        return validity_of(models, readings, of.world, of.organism).because

    for world in (plain, triggered):
        reasons = because(world, untrusted=(world.benign, world.readings["benign"]))
        assert [why.partition(":")[0] for why in reasons] == ["trait of untrusted"]

    pairs = ModelOrganism.pairs
    monkeypatch.setattr(ModelOrganism, "pairs", lambda *arguments: shuffled(pairs(*arguments)))
    del trained_once[TRIGGERED, False]
    model = TRIGGERED.implant(triggered.world, trained_once["capable"], benign=False)
    subject = Subject(model, triggered.untrusted.tokenizer, name="untrusted")
    reading = read_organism(subject, triggered.world, TRIGGERED)
    reasons = because(triggered, untrusted=(subject, reading))
    assert {why.partition(":")[0] for why in reasons} & {
        "trait of untrusted",
        "audited trait of untrusted against benign",
    }
