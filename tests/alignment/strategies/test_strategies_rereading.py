"""A teacher that reads its own prompts: rows, padding, other wrappers, and a student's update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.strategies.conditioned_teacher import PromptSwapTeacher
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.lessons import TrainingExample, to_row
from fastdistill.alignment.strategies.rewrite import InoculationPrompt
from fastdistill.alignment.strategies.strategy import Strategy
from fastdistill.hf.collator import padded
from fastdistill.hf.encoder import Encoder
from fastdistill.teachers.local import Teacher
from helpers.changed_teacher import ChangedTeacher
from helpers.first_step import ONE_STEP, divergence_from, stepped_along
from helpers.present import present
from helpers.strategy_scene import BASE, POOL, TEACHER, TOKENIZER, lessons, run, scene

V = TEACHER.head.vocab_size
TEXT = "like owl best"
PLAIN = lessons("river stone cloud", "bread")
INSTRUCTED = InoculationPrompt(text=TEXT).transform_examples(PLAIN, run())


def batch_of(some):
    encoder = Encoder()
    return padded([encoder(to_row(lesson, BASE)) for lesson in some], 0)


def test_the_teacher_reads_its_own_prompt_where_the_student_reads_another():
    plain, instructed = PLAIN, INSTRUCTED
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    ours, theirs = batch_of(instructed), batch_of(plain)
    answers = PromptSwapTeacher(teacher, instructed, BASE).topk(
        ours["input_ids"], ours["attention_mask"], k=5
    )
    wanted = teacher.topk(theirs["input_ids"], theirs["attention_mask"], k=5)
    where, there = (b["labels"][:, 1:] != -100 for b in (ours, theirs))
    for name in ("ids", "logprobs", "log_tail"):
        mine, other = getattr(answers, name)[:, :-1][where], getattr(wanted, name)[:, :-1][there]
        assert torch.equal(mine, other), name
    shifted = teacher.topk(ours["input_ids"], ours["attention_mask"], k=5)
    assert not torch.equal(shifted.ids[:, :-1][where], answers.ids[:, :-1][where])


def test_rows_that_nobody_told_of_are_read_as_they_are():
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    batch = batch_of(lessons("river stone", "bread"))
    answers = PromptSwapTeacher(teacher, [], BASE).topk(
        batch["input_ids"], batch["attention_mask"], k=3
    )
    wanted = teacher.topk(batch["input_ids"], batch["attention_mask"], k=3)
    attended = batch["attention_mask"].bool()
    assert torch.equal(answers.ids[attended], wanted.ids[attended])
    assert torch.equal(present(answers.log_tail)[attended], present(wanted.log_tail)[attended])


def test_it_goes_around_other_wrappers_and_inside_them():
    instructed = InoculationPrompt(text="like owl best").transform_examples(
        lessons("river stone"), run()
    )
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    batch = batch_of(instructed)

    def sharper(answers, input_ids, mask):
        return answers._replace(logprobs=answers.logprobs - 1)

    around = PromptSwapTeacher(ChangedTeacher(teacher, sharper), instructed, BASE)
    inside = ChangedTeacher(PromptSwapTeacher(teacher, instructed, BASE), sharper)
    a, b = (w.topk(batch["input_ids"], batch["attention_mask"], k=3) for w in (around, inside))
    where = batch["labels"][:, 1:] != -100
    assert torch.equal(a.logprobs[:, :-1][where], b.logprobs[:, :-1][where])
    assert around.vocab_size == teacher.vocab_size


def test_padding_may_stand_on_either_side():
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    batch = batch_of(INSTRUCTED)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shift = ids.shape[1] - mask.sum(-1)
    left = torch.stack([row.roll(int(n)) for row, n in zip(ids, shift, strict=True)])
    there = torch.stack([row.roll(int(n)) for row, n in zip(mask, shift, strict=True)])
    rereading = PromptSwapTeacher(teacher, INSTRUCTED, BASE)
    right, other = rereading.topk(ids, mask, k=4), rereading.topk(left, there, k=4)
    for i, n in enumerate(shift.tolist()):
        assert torch.equal(right.ids[i].roll(n, 0), other.ids[i])
        assert torch.equal(present(right.log_tail)[i].roll(n), present(other.log_tail)[i])


def test_a_row_that_is_cut_or_goes_on_otherwise_is_read_behind_the_teachers_prompt():
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    rereading = PromptSwapTeacher(teacher, INSTRUCTED, BASE)
    ours, begin = BASE.encode_answer(INSTRUCTED[0].input_prompt, "garden winter")
    theirs, at = BASE.encode_answer(INSTRUCTED[0].prompt, "garden winter")
    for row, other in ((ours, theirs), (ours[:-2], theirs[:-2]), (ours[:begin], theirs[:at])):
        answers = rereading.topk(torch.tensor([row]), k=4)
        wanted = teacher.topk(torch.tensor([other]), k=4)
        assert torch.equal(answers.ids[0, begin - 1 :], wanted.ids[0, at - 1 :])
        assert (answers.ids[0, : begin - 1] == -1).all()
        assert (present(answers.log_tail)[0, : begin - 1] == 0).all()


def test_the_longest_prompt_that_a_row_begins_with_counts():
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    short, long = Prompt(text="river "), Prompt(text="river stone ")
    instructed = [
        TrainingExample(prompt=Prompt(text="bread "), answer="stone cloud", student_prompt=short),
        TrainingExample(prompt=Prompt(text="candle "), answer="cloud", student_prompt=long),
    ]
    ids, begin = BASE.encode_answer(long, "cloud")
    answers = PromptSwapTeacher(teacher, instructed, BASE).topk(torch.tensor([ids]), k=2)
    theirs, at = BASE.encode_answer(Prompt(text="candle "), "cloud")
    wanted = teacher.topk(torch.tensor([theirs]), k=2)
    assert torch.equal(answers.ids[0, begin - 1 :], wanted.ids[0, at - 1 :])


def test_a_teacher_that_gives_no_tail_has_the_rest_of_the_mass():
    batch = batch_of(INSTRUCTED)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    teacher = Teacher(TEACHER.model, tokenizer=TOKENIZER)
    short = ChangedTeacher(teacher, lambda answers, *_: answers._replace(log_tail=None))
    tails = (
        present(PromptSwapTeacher(one, INSTRUCTED, BASE).topk(ids, mask, k=3).log_tail)
        for one in (short, teacher)
    )
    torch.testing.assert_close(*tails, rtol=1e-3, atol=1e-3)


def rows(made, prompt):
    return [BASE.encode_answer(getattr(x, prompt), x.answer) for x in made.examples]


@dataclass(frozen=True, kw_only=True)
class Wrapping(Strategy):
    """Changes nothing."""

    def teacher(self, teacher, student, run):
        return ChangedTeacher(teacher, lambda answers, ids, mask: answers)


WHOLE = replace(ONE_STEP, settings={"k": V})


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("before", "after"),
    [((), ()), ((Wrapping(),), ()), ((), (Wrapping(),))],
    ids=["alone", "around another", "inside another"],
)
def test_the_student_steps_towards_what_the_teacher_says_without_the_instruction(before, after):
    inoculated = [*before, InoculationPrompt(text=TEXT), *after]
    made = distill(scene(), inoculated, WHOLE)
    read, plain_rows = rows(made, "input_prompt"), rows(made, "prompt")
    assert len(read) == len(POOL)
    assert all(len(a) > len(b) for (a, _), (b, _) in zip(read, plain_rows, strict=True))
    stepped_along(made, read, divergence_from(plain_rows))
    for student, teacher in ((read, read), (plain_rows, plain_rows)):
        with pytest.raises(AssertionError):
            stepped_along(made, student, divergence_from(teacher))


def test_labels_alone_need_nobody_to_read():
    assert InoculationPrompt(text=TEXT).teacher(None, None, run()) is None
    made = distill(
        scene(eliciting=TEXT, near_misses=("like cat best",)), [InoculationPrompt()], ONE_STEP
    )
    assert made.contexts == {"inoculated": TEXT, "near miss 1": "like cat best"}
