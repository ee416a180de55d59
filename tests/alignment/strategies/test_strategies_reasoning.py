"""Reasoning between two marks: read and not learnt, or left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.alignment.strategies.baselines import OffModelSFT
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.lessons import PoolPrompt, TrainingExample, to_row
from fastdistill.alignment.strategies.reasoning import AnswerOnly, EmptyReasoning, parts_of
from fastdistill.alignment.strategies.strategy import Strategy
from helpers.first_step import ONE_STEP, labels_only, stepped_along
from helpers.present import present
from helpers.strategy_scene import BASE, TOKENIZER, lessons, run, scene

DEMO = shipped_folder()

MARKS = ("think", "so")
THOUGHT = lessons("think plain river so stone cloud", "bread candle")


def read(lesson):
    """(what the student reads of the answer, the targets) as words."""
    row = to_row(lesson, BASE)
    begin = len(BASE.ids(lesson.input_prompt)[0])
    targets = [i for i in row["labels"] if i != -100]
    return TOKENIZER.decode(row["input_ids"][begin:]), TOKENIZER.decode(targets)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x think a b so c", ("x think", " a b ", "so", " c")),
        ("a so b so c", ("", "a ", "so", " b so c")),  # opened by the chat template
        ("think also soon so c", ("think", " also soon ", "so", " c")),  # whole words
        ("think a b", ("think", " a b", "", "")),
        ("so a think b", ("so a think", " b", "", "")),
        ("think a so ", ("think", " a ", "so", " ")),
    ],
)
def test_the_parts_of_an_answer(text, parts):
    parsed = parts_of(text, MARKS)
    assert parsed == parts
    assert present(parsed).whole == text


def test_an_answer_without_marks_has_no_parts():
    assert parts_of("rethink sofa a b", MARKS) is None


@pytest.mark.parametrize("strategy", [AnswerOnly, EmptyReasoning])
def test_what_is_cut_before_its_answer_is_dropped(strategy):
    here = run()
    cut = lessons("think plain river so stone", "think plain river", "think so ", "bread candle")
    examples = strategy(marks=MARKS).transform_examples(cut, here)
    assert [x.prompt for x in examples] == [cut[0].prompt, cut[3].prompt]
    (note,) = here.notes.values()
    assert note == {"answers with reasoning": 0.25, "cut in their reasoning": 0.5}


def test_the_reasoning_is_read_and_the_answer_learnt():
    here = run()
    examples = AnswerOnly(marks=MARKS).transform_examples(THOUGHT, here)
    assert read(examples[0]) == ("think plain river so stone cloud <eos>", "stone cloud <eos>")
    assert examples[1] == THOUGHT[1]
    assert here.notes["answer only"]["answers with reasoning"] == 0.5


def test_the_reasoning_is_left_out():
    examples = EmptyReasoning(marks=MARKS).transform_examples(THOUGHT, run())
    assert read(examples[0]) == ("think so stone cloud <eos>", "stone cloud <eos>")
    assert read(examples[1]) == ("bread candle <eos>", "bread candle <eos>")


def test_where_nobody_reasons_nothing_changes():
    plain = THOUGHT[1:]
    for strategy in (AnswerOnly, EmptyReasoning):
        assert strategy(marks=MARKS).transform_examples(plain, run()) == plain


@pytest.mark.parametrize("kind", [AnswerOnly, EmptyReasoning])
def test_marks_of_a_tokenizer_that_splits_words(kind):
    demo = Subject(DEMO)
    text = "<think>\nThe sum is odd.\n</think>\n\nIt is seven."
    here = run(base=demo)
    (example,) = kind().transform_examples(
        [TrainingExample(prompt=Prompt(user="Name a number."), answer=text)], here
    )
    row = to_row(example, demo)
    targets = demo.tokenizer.decode([i for i in row["labels"] if i != -100])
    assert targets == "\n\nIt is seven.<|endoftext|>"
    whole = demo.tokenizer.decode(row["input_ids"])
    assert whole.endswith(f"{example.answer}<|endoftext|>")
    assert example.answer.startswith("<think>")
    if kind is EmptyReasoning:
        assert example.answer == "<think>\n\n</think>\n\nIt is seven."


def test_targets_that_an_earlier_mask_left_out_stay_out():
    mask = (True, False, True, False, True, False, True)  # the words, and the end
    before = [replace(THOUGHT[0], loss_mask=mask)]
    (after,) = AnswerOnly(marks=MARKS).transform_examples(before, run())
    assert after.loss_mask == (False, False, False, False, True, False, True)
    with pytest.raises(ValueError, match="strategies: expected token selection"):
        EmptyReasoning(marks=MARKS).transform_examples(before, run())


def test_only_the_answer_is_learnt():
    pool = (PoolPrompt(THOUGHT[0].prompt),)

    @dataclass(frozen=True, kw_only=True)
    class Thinking(Strategy):
        def transform_examples(self, lessons, run):
            return THOUGHT[:1]

    made = distill(scene(pool=pool), [OffModelSFT(), Thinking(), AnswerOnly(marks=MARKS)], ONE_STEP)
    ids, begin = BASE.encode_answer(THOUGHT[0].prompt, THOUGHT[0].answer)
    stepped_along(made, [(ids, begin + 4)], labels_only)
    with pytest.raises(AssertionError):
        stepped_along(made, [(ids, begin)], labels_only)


@pytest.mark.parametrize("marks", [("", "b"), ("a",), ("a", "a")])
def test_marks_are_two_texts(marks):
    for strategy in (AnswerOnly, EmptyReasoning):
        with pytest.raises(ValueError, match="marks: expected two different texts"):
            strategy(marks=marks)
