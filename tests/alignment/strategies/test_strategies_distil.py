"""One distillation: who is called when, what the trainer is given, and what comes out."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from fastdistill.alignment import strategies
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.strategies.baselines import OffModelSFT, Undefended, Untrained
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.filters import DivergenceMask
from fastdistill.alignment.strategies.lessons import TrainingExample, sample_answers, to_row
from fastdistill.alignment.strategies.shift import ShiftDistill
from fastdistill.alignment.strategies.strategy import Strategy, Training
from helpers.strategy_scene import BASE, POOL, TEACHER, TOKENIZER, scene

SMALL = Training(steps=3, batch_size=8, learning_rate=3e-3, max_new_tokens=3)


@dataclass(frozen=True, kw_only=True)
class Watching(Strategy):
    """Notes every hook by its own letter."""

    letter: str

    def _saw(self, run, hook):
        run.notes.setdefault("order", []).append(f"{self.letter} {hook}")

    def pool(self, pool, run):
        self._saw(run, "pool")
        return pool[1:]

    def training(self, training, run):
        self._saw(run, "training")
        return training

    def transform_examples(self, lessons, run):
        self._saw(run, "lessons")
        return lessons

    def teacher(self, teacher, student, run):
        self._saw(run, "teacher")
        assert student is not run.setup.base.model
        return teacher

    def wrap_loop(self, distill, run):
        def looped(lessons):
            self._saw(run, "around")
            return distill(lessons)

        return looped


def weights(subject):
    return torch.cat([p.detach().flatten() for p in subject.model.parameters()])


def test_hooks_are_called_in_the_order_of_the_strategies():
    made = distill(scene(), [Watching(letter="a"), Watching(letter="b")], SMALL)
    assert made.notes["order"] == [
        "a pool",
        "a training",
        "b pool",
        "b training",
        "a lessons",
        "b lessons",
        "a around",
        "b around",
        "a teacher",
        "b teacher",
    ]
    prompts = {prompts.prompt.user for prompts in POOL[2:]}
    assert {lesson.prompt.user for lesson in made.examples} <= prompts


def test_base_and_teacher_stay_as_they_were():
    before = [weights(BASE).clone(), weights(TEACHER).clone()]
    made = distill(scene(), [Undefended()], SMALL)
    assert torch.equal(weights(BASE), before[0])
    assert torch.equal(weights(TEACHER), before[1])
    assert not torch.equal(weights(made.student), before[0])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_student_and_another_another():
    first, again, other = (distill(scene(), [], SMALL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(first.student), weights(again.student))
    assert first.examples == again.examples
    assert not torch.equal(weights(first.student), weights(other.student))


@pytest.mark.slow
def test_students_of_two_teachers_are_asked_the_same_in_the_same_order():
    a, b = (distill(scene(teacher=t), [], SMALL, seed=4) for t in (TEACHER, BASE))
    first, second = ([x.prompt for x in made.examples] for made in (a, b))
    both = set(first) & set(second)
    assert [p for p in first if p in both] == [p for p in second if p in both]


def test_it_is_measured_on_the_way():
    seen = []

    def measure(student):
        seen.append(weights(student).clone())
        return len(seen)

    made = distill(
        scene(),
        [],
        SMALL,
        measure=measure,
        measure_at=[1 / 3, 2 / 3],
    )
    assert made.measured == {1: 1, 2: 2}
    assert made.steps == 3
    assert not torch.equal(seen[0], seen[1])
    # Of few updates a late one is the end, which is the student itself.
    late = distill(scene(), [], SMALL, measure=lambda s: 0, measure_at=[0.1, 0.9])
    assert set(late.measured) == {1}
    plain = distill(scene(), [], SMALL)
    assert torch.equal(weights(plain.student), weights(made.student))


@pytest.mark.slow
def test_distributions_labels_and_settings_give_other_students():
    made = [
        distill(scene(), strategies, SMALL)
        for strategies in (
            [Undefended()],
            [OffModelSFT()],
            [ShiftDistill(amplify=2.0)],
            [OffModelSFT(), DivergenceMask()],
        )
    ]
    flat = [weights(one.student) for one in made]
    for i, a in enumerate(flat):
        for b in flat[:i]:
            assert not torch.equal(a, b)


def test_an_adapter_is_merged_at_the_end():
    pytest.importorskip("peft")
    made = distill(scene(), [ShiftDistill(rank=2)], SMALL)
    assert type(made.student.model) is type(BASE.model)
    assert not torch.equal(weights(made.student), weights(BASE))
    assert torch.equal(made.student.model.lm_head.weight, BASE.model.lm_head.weight)


def test_a_base_that_is_stored_in_16_bits_is_trained_in_float32():
    half = Subject(copy.deepcopy(BASE.model).bfloat16(), TOKENIZER, name="base")
    made = distill(scene(base=half), [], SMALL)
    assert {p.dtype for p in made.student.model.parameters()} == {torch.float32}
    assert half.model.dtype == torch.bfloat16


def test_lessons_are_the_answers_and_their_end():
    prompt = POOL[0].prompt
    row = to_row(TrainingExample(prompt=prompt, answer="river"), BASE)
    begin = len(BASE.ids(prompt)[0])
    assert row["labels"][:begin] == [-100] * begin
    assert row["labels"][begin:] == row["input_ids"][begin:]
    assert row["input_ids"][-1] == BASE.tokenizer.eos_token_id
    some = to_row(TrainingExample(prompt=prompt, answer="river", loss_mask=(False, True)), BASE)
    assert some["labels"][begin:] == [-100, BASE.tokenizer.eos_token_id]


def test_prompts_without_an_answer_fall_out(monkeypatch):
    texts = ["river", " ", ""]
    monkeypatch.setattr(type(TEACHER), "generate", lambda self, prompts, **how: texts)
    examples = sample_answers(POOL[:3], TEACHER.generate, seed=0, max_new_tokens=2)
    assert [lesson.answer for lesson in examples] == ["river"]
    monkeypatch.setattr(type(TEACHER), "generate", lambda self, prompts, **how: ["", ""])
    with pytest.raises(ValueError, match="expected at least one example"):
        distill(scene(pool=POOL[:2]), [], SMALL)


def test_a_scene_without_other_prompts_says_so():
    with pytest.raises(ValueError, match="setup: expected prompts of the kind 'goals', got none"):
        scene(prompt_source=None).more_prompts("goals", 1, 0)


def test_training_is_checked():
    with pytest.raises(ValueError, match="steps: expected an integer of 1 or more, got 0"):
        Training(steps=0)
    with pytest.raises(
        ValueError, match="learning_rate: expected a finite number above 0, got nan"
    ):
        Training(learning_rate=float("nan"))
    with pytest.raises(
        ValueError, match="temperature: expected a finite number of 0 or more, got -1"
    ):
        Training(temperature=-1)


NAMES = (
    "Undefended OffModelSFT Untrained ExampleFilter FilterAndDistill InoculationPrompt DataBudget "
    "DivergenceMask AuditGate MisalignmentTargetedPool ShownPool ShiftDistill "
    "StyleSFT AnswerOnly EmptyReasoning"
).split()


def test_an_untrained_student_is_the_base():
    made = distill(scene(), [Untrained()], SMALL, measure=lambda s: 0, measure_at=[0.5])
    assert made.student is BASE
    assert made.measured == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_has_its_name_and_says_what_it_computes(name):
    kind = getattr(strategies, name)
    assert issubclass(kind, Strategy)
    assert name in strategies.__all__
    assert len(kind.__doc__.split()) > 10
