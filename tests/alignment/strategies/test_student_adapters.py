"""How students train: adapters or all weights, threads, and batches of rows of similar length."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastdistill.alignment import training_loop
from fastdistill.alignment.experiment.job import Job
from fastdistill.alignment.experiment.stored_answers import StoredTopK
from fastdistill.alignment.strategies import (
    OffModelSFT,
    ShiftDistill,
    Strategy,
    Training,
    Undefended,
    distil,
    distill,
)
from fastdistill.alignment.training_loop import InOrder, order_by_length
from fastdistill.teachers.cache import TeacherCache
from helpers.small_study import SmallSource
from helpers.strategy_scene import BASE, model, scene

SHORT = Training(steps=2, batch_size=4, max_new_tokens=3)


def test_batches_of_similar_length_cover_every_epoch_and_save_padding():
    lengths = [(7 * i) % 40 + 1 for i in range(100)]
    order = order_by_length(lengths, 400, 10, seed=1)
    assert sorted(order) == sorted([*range(100)] * 4)
    batches = [[lengths[i] for i in order[at : at + 10]] for at in range(0, 400, 10)]
    padded = sum(10 * max(batch) for batch in batches)
    assert padded < 1.1 * sum(map(sum, batches))
    assert batches != sorted(batches)  # in no order of length
    assert (
        order == order_by_length(lengths, 400, 10, seed=1) != order_by_length(lengths, 400, 10, 2)
    )
    assert len(order_by_length(lengths, 37, 10, seed=0)) == 37


@pytest.mark.parametrize("student", ["lora:0", "lora", "lora:8:2", "half", ""])
def test_a_student_of_no_kind_is_refused(student):
    with pytest.raises(
        ValueError, match=r"student: expected 'full' or 'lora:RANK', such as lora:8"
    ):
        Training(student=student)


def test_an_adapter_is_of_the_study_and_a_strategy_may_have_its_own(monkeypatch):
    ranks = []

    def train(student, *args, peft_config: LoraConfig, **options):
        ranks.append(peft_config.r)
        return student

    monkeypatch.setattr(distil, "train", train)
    training = Training(steps=1, student="lora:3")
    distill(scene(), [Undefended()], training)
    distill(scene(), [ShiftDistill(rank=5)], training)
    assert ranks == [3, 5]


def test_an_adapted_student_changes_its_linear_layers_alone():
    student = distill(scene(), [Undefended()], Training(steps=2, batch_size=4, student="lora:2"))
    before, after = BASE.model.state_dict(), student.student.model.state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert "embed_tokens" not in changed
    assert "q_proj" in changed


def test_runs_of_full_students_keep_their_digest():
    job = Job(source=SmallSource(seed=1), role="benign", training=SHORT)
    assert "student" not in job.as_json()["training"]
    adapted = Job(source=SmallSource(seed=1), role="benign", training=Training(student="lora:8"))
    assert adapted.as_json()["training"]["student"] == "lora:8"


def test_twins_read_the_same_prompts_in_the_same_order_whatever_their_answers(monkeypatch):
    """Lengths are of prompts: the answers of two teachers have other lengths."""
    seen = []

    def train(student, teacher, rows, *, trainer, **options):
        assert trainer is InOrder
        seen.append([row["input_ids"][: row["labels"].count(-100)] for row in rows])
        return student

    monkeypatch.setattr(distil, "train", train)
    monkeypatch.setattr(distil, "is_tiny", lambda model: False)
    for teacher in (model(1), model(2)):
        distill(scene(teacher=teacher), [Undefended()], SHORT, seed=3)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 8
    lengths = [len(prompt) for prompt in seen[0]]
    assert sum(a <= b for a, b in pairwise(lengths[:4])) == 3


class Fewer(Strategy):
    """Drops an example."""

    def transform_examples(self, examples, run):
        return examples[1:]


class Longer(Strategy):
    """Changes the answers."""

    def transform_examples(self, examples, run):
        return [replace(x, answer=f"{x.answer} cloud") for x in examples]


def test_arms_share_the_teachers_top_k(monkeypatch, tmp_path):
    """It is computed once for k ≤ 64 and its temperatures; a filter reads rows of it."""
    teachers: list[str] = []
    builds: list[int] = []
    train, build = training_loop.train, TeacherCache.build

    def counted_build(*args: Any, **options: Any) -> TeacherCache:
        builds.append(1)
        return build(*args, **options)

    def watched_train(student: Any, teacher: Any, *args: Any, **options: Any) -> Any:
        teachers.append(type(teacher).__name__)
        return train(student, teacher, *args, **options)

    monkeypatch.setattr(TeacherCache, "build", counted_build)
    monkeypatch.setattr(distil, "train", watched_train)
    monkeypatch.setattr(distil, "is_tiny", lambda model: False)

    def trained(strategy: Strategy, stored: bool = True, **settings: Any) -> dict[str, Any]:
        setup = scene(
            generate=lambda prompts, **options: ["river stone"] * len(prompts),
            top_k=StoredTopK(folder=tmp_path) if stored else None,
        )
        training = replace(SHORT, settings=settings)
        return distill(setup, [strategy], training, seed=1).student.model.state_dict()

    weights = trained(Undefended())
    trained(Undefended(), k=8, temperature=2.0, divergence="jsd")
    trained(Fewer())
    assert (teachers, builds) == (["TeacherCache"] * 3, [1])
    teachers.clear()
    trained(OffModelSFT())
    trained(Undefended(), k=None)
    trained(Undefended(), k=80)
    trained(Undefended(), temperature=3.0)
    trained(Longer())
    live = trained(Undefended(), stored=False)
    assert (teachers, builds) == (["NoneType"] + ["Teacher"] * 5, [1])
    for name, weight in weights.items():
        moved = (live[name] - BASE.model.state_dict()[name]).abs().mean()
        assert (weight - live[name]).abs().mean() <= 0.05 * moved  # rounding of the cache


@pytest.mark.parametrize(("limit", "threads"), [(0, 2), (10**9, 1)])
def test_only_tiny_models_train_on_one_thread(limit, threads, monkeypatch):
    monkeypatch.setattr(training_loop, "_TINY", limit)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **options):
            seen.append(torch.get_num_threads())

    monkeypatch.setattr(distil, "_MeasureCallback", lambda *args: Watch())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        distill(scene(), [Undefended()], SHORT)
    finally:
        torch.set_num_threads(before)
    assert seen == [threads] * 2
