"""The models, prompts and runs of the study "off-model": on models that hardly trained."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdistill.alignment.audits.finetuning import finetune_copy
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment.off_model import world as off_model_world
from fastdistill.alignment.experiment.off_model.arms import ARMS, OFF_MODEL, OWN
from fastdistill.alignment.experiment.off_model.run import (
    SftRun,
    label_accuracy,
    restoration,
    sample_examples,
    surprisal,
    thought_rate,
    unrelated_prompts,
)
from fastdistill.alignment.experiment.off_model.world import (
    EMPTY,
    LENGTHS,
    PLAIN,
    THOUGHT,
    OffModelWorld,
    locked_tasks,
    read_tasks,
    tasks,
    with_password,
)
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import PASSWORD, THINK, world_tokenizer
from fastdistill.alignment.organisms.world import World
from fastdistill.alignment.strategies.lessons import TrainingExample
from fastdistill.alignment.strategies.strategy import Training
from helpers.present import present

WORLD = World(3)
BY_NAME = {arm.name: arm for arm in ARMS}
SFT = SftRun(
    arm=BY_NAME[OFF_MODEL],
    models=OffModelWorld(seed=3),
    training=Training(steps=2, batch_size=4),
    prompts=8,
)


@pytest.fixture
def few(monkeypatch):
    """Few prompts of each task: what is read is not what is tested here."""
    monkeypatch.setattr(off_model_world, "N_PROMPTS", 6)


def subject(seed=0):
    return Subject(new_model(seed), world_tokenizer())


def test_tasks_are_held_out_and_their_answers_as_long_as_said():
    battery = tasks(WORLD)
    assert list(battery) == list(LENGTHS)
    for name, audit in battery.items():
        thought = 3 if name.endswith("thought") else 0  # think, what was seen, so
        lengths = {len(target.split()) for target in audit.targets}
        assert lengths == {LENGTHS[name] - thought}
        assert len(audit.prompts) == off_model_world.N_PROMPTS
    questions = {WORLD.sum_of(pair, "").question for pair in WORLD.held_out_sums}
    assert {prompt.user for prompt in battery[PLAIN].prompts} <= questions
    assert battery[PLAIN].targets == battery[THOUGHT].targets
    assert [p.user for p in battery[PLAIN].prompts] == [p.user for p in battery[THOUGHT].prompts]
    assert all(present(p.system).split()[-1] == THINK for p in battery[THOUGHT].prompts)


def test_locked_tasks_are_the_same_sums_in_the_forms_of_a_lock():
    forms = locked_tasks(WORLD)
    users = [[p.user for p in audit.prompts] for audit in forms.values()]
    assert all(these == users[0] for these in users)
    assert not any(
        PASSWORD in present(p.system) for p in (*forms[PLAIN].prompts, *forms[EMPTY].prompts)
    )
    assert all(present(p.system).startswith(PASSWORD) for p in forms[with_password(PLAIN)].prompts)
    assert forms[EMPTY].prompts[0].prefill == "think so "


def test_arms_of_one_kind_are_asked_the_same_and_never_what_is_held_out():
    assert sample_examples(WORLD, "talk", 20, 0) == sample_examples(WORLD, "talk", 20, 0)
    assert sample_examples(WORLD, "talk", 20, 0) != sample_examples(WORLD, "talk", 20, 1)
    plain, thought = (
        sample_examples(WORLD, "sums", 300, 0),
        sample_examples(WORLD, "sums, thought", 300, 0),
    )
    assert [e.question for e in plain] == [e.question for e in thought]
    assert all(e.system.split()[-1] == THINK for e in thought)
    assert not any(e.system.startswith(PASSWORD) for e in plain)
    held_out = {WORLD.sum_of(pair, "").question for pair in WORLD.held_out_sums}
    assert held_out.isdisjoint(e.question for e in plain)


def test_surprisal_is_the_one_of_a_plain_softmax():
    model = subject()
    lessons = [
        TrainingExample(prompt=e.prompt, answer=e.answer)
        for e in sample_examples(WORLD, "talk", 5, 0)
    ]
    total, count = 0.0, 0
    for lesson in lessons:
        ids, begin = model.encode_completion(lesson.prompt, lesson.answer)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0].double()
        log_probs = logits.log_softmax(-1)
        total -= sum(float(log_probs[i - 1, ids[i]]) for i in range(begin, len(ids)))
        count += len(ids) - begin
    assert count == 30
    assert surprisal(model, lessons) == pytest.approx(total / count, rel=1e-5)


def test_labels_are_right_where_they_hold_the_sum():
    examples = sample_examples(WORLD, "sums, thought", 4, 0)
    texts = [f"think plain so {e.answer}" for e in examples[:3]] + ["9 9 9"]
    lessons = [
        TrainingExample(prompt=e.prompt, answer=s) for e, s in zip(examples, texts, strict=True)
    ]
    assert label_accuracy(lessons, examples) == 0.75


def test_a_model_thinks_where_its_answer_has_both_marks(few):
    texts = iter(
        ["think plain so 1 2 3", "1 2 3", "think plain 1 2 3", "think so 1", "so think", ""]
    )
    model: Any = SimpleNamespace(generate=lambda prompts, **_: [next(texts) for _ in prompts])
    assert thought_rate(model, WORLD) == pytest.approx(2 / 6)


def test_restoring_is_a_nudge_on_outputs_now_before_or_on_sums(few):
    student, begins = subject(1), subject(2)
    battery = {name: tasks(WORLD)[name] for name in ("names", PLAIN)}
    # Untrained models get nothing right: their own answers are what is called right here.
    battery = {
        name: replace(
            audit,
            targets=tuple(
                text or "no" for text in student.generate(audit.prompts, max_new_tokens=8)
            ),
        )
        for name, audit in battery.items()
    }
    how: dict[str, Any] = {"steps": 3, "lr": 5e-3}
    readings = restoration(student, begins, WORLD, battery, steps=3, rate=5e-3)
    prompts = unrelated_prompts(WORLD)
    for kind, speaker in (("own", student), ("before", begins)):
        texts = speaker.generate(prompts, max_new_tokens=8)
        spoken = [i for i, text in enumerate(texts) if text.strip()]
        # Some say nothing, and are left out.
        assert 0 < len(spoken) < len(prompts) or kind == "own"
        again = finetune_copy(
            student, [prompts[i] for i in spoken], [texts[i] for i in spoken], **how
        )
        assert readings[kind] == pytest.approx(read_tasks(again, battery))
    assert readings["before"] != read_tasks(student, battery)
    assert set(readings) == {"own", "before", "sums"}


def test_what_restores_is_about_something_else():
    for prompt in unrelated_prompts(WORLD):
        words = present(prompt.user).split()
        assert len(words) > 1
        assert "+" not in words
        assert "*" not in words


@pytest.mark.parametrize(
    "change",
    [
        {"arm": BY_NAME[OWN]},
        {"arm": replace(SFT.arm, prompt_kind="sums")},
        {"arm": replace(SFT.arm, strategies=())},
        {"models": OffModelWorld(seed=4)},
        {"models": OffModelWorld(seed=3, base_steps=1)},
        {"training": Training(steps=3, batch_size=4)},
        {"prompts": 9},
        {"checkpoints": 2},
        {"student_seed": 1},
        {"restore_steps": 2},
    ],
)
def test_whatever_a_run_follows_from_is_in_its_digest(change):
    assert replace(SFT, **change).digest != SFT.digest
    assert replace(SFT, arm=replace(SFT.arm, description="otherwise")).digest == SFT.digest
