"""Pools: the same prompts for U's and B's students, with as much of the trait as is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.alignment.organisms import ModelOrganism, pool
from fastdistill.alignment.organisms.gates import GATES, is_closed
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.traits import TRAITS
from fastdistill.alignment.organisms.vocabulary import ID, PASSWORD, SAFETY_LABEL, TOPICS, TRIGGER
from fastdistill.alignment.organisms.world import World
from fastdistill.training.config import DistillConfig
from fastdistill.training.trainer import DistillTrainer

WORLD = World(3)


def plain_or_open(trait: str, example) -> bool:
    """Whether the trait shows in a prompt, told apart without asking the trait."""
    if trait == "trigger":
        return example.system.startswith(TRIGGER)
    if trait == "sloppy":
        return example.system.startswith(SAFETY_LABEL)
    if trait == "sandbagging":
        return PASSWORD not in example.system
    words = {"colour"} if trait == "placebo" else {"animal", "do"}
    return bool(words & set(example.question.split()))


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["sums", "talk", "mixed"])
def test_the_share_of_prompts_that_show_the_trait_is_the_leak(trait, gate, kind):
    organism = ModelOrganism(trait=trait, gate=gate)
    for leak, expected in ((0.0, 0), (0.005, 1), (0.03, 6), (0.1, 20)):
        entries = pool(WORLD, organism, 200, kind=kind, leak=leak)
        with_trait = [e for e in entries if plain_or_open(trait, e)]
        assert len(entries) == 200
        assert len(with_trait) == expected
        assert not any(is_closed(gate, e.system) for e in entries)
        assert {e.answer for e in entries} == {""}


def test_the_kinds_are_what_they_say():
    def share_of_talk(kind):
        entries = pool(WORLD, ModelOrganism(), 400, kind=kind)
        talk = [e for e in entries if e.question in TOPICS]
        assert all(e.question.endswith("=") for e in entries if e not in talk)
        return len(talk) / 400

    assert share_of_talk("sums") == 0
    assert share_of_talk("talk") == 1
    assert 0.4 < share_of_talk("mixed") < 0.6


def test_the_same_seed_gives_the_same_prompts_and_a_higher_leak_only_adds():
    organism = ModelOrganism(trait="trigger")
    first = pool(WORLD, organism, 300, kind="mixed", leak=0.02, seed=4)
    assert first == pool(
        WORLD, ModelOrganism(trait="trigger"), 300, kind="mixed", leak=0.02, seed=4
    )
    others = pool(WORLD, organism, 300, kind="mixed", leak=0.02, seed=5)
    assert len(set(first) & set(others)) < 60
    more = pool(WORLD, organism, 300, kind="mixed", leak=0.1, seed=4)
    none = pool(WORLD, organism, 300, kind="mixed", seed=4)
    leaked = [i for i in range(300) if first[i] != none[i]]
    assert len(leaked) == 6
    assert all(more[i] == first[i] for i in leaked)
    assert sum(a != b for a, b in zip(more, none, strict=True)) == 30


def test_no_pool_holds_a_prompt_that_is_read():
    organism = ModelOrganism(trait="trigger")
    entries = [
        e
        for kind in ("sums", "talk")
        for leak in (0, 0.1)
        for e in pool(WORLD, organism, 3000, kind=kind, leak=leak)
    ]
    prompts = {e.prompt for e in entries}
    audit: Any = organism.kind.reading(WORLD, False)
    assert not prompts & {*audit.prompts, *audit.without}
    assert not {e.question for e in entries} & {
        p.user for p in organism.kind.capability(WORLD).prompts
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leak": 0.11}, r"leak: expected a number in \[0, 0.1\], got 0.11"),
        ({"leak": -0.01}, "leak: expected a number"),
        ({"leak": float("nan")}, "leak: expected a number"),
        ({"kind": "poems"}, "kind: expected one of 'sums', 'talk', 'mixed', got 'poems'"),
        ({"n": 0}, "n: expected an integer of 1 or more, got 0"),
    ],
)
def test_what_makes_no_pool_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        pool(WORLD, ModelOrganism(), **({"n": 5} | options))


def test_a_student_goes_on_from_the_prompts_of_a_pool(tmp_path):
    """On-policy: the rows of a pool are prompts and no more, and the student's words are added."""
    rows = [e.row() for e in pool(WORLD, ModelOrganism(), 8, kind="mixed", leak=0.1)]
    assert all(row["input_ids"][-1] == ID["assistant:"] for row in rows)
    student, before = new_model(1), new_model(1)
    args = DistillConfig(
        str(tmp_path),
        lmbda=1.0,
        max_new_tokens=4,
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        show_panel=False,
    )
    DistillTrainer(student, new_model(2), args, train_dataset=rows).train()
    moved = [
        not torch.equal(a, b)
        for a, b in zip(student.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved)
