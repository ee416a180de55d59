"""What the student reads and is told."""

from __future__ import annotations

from typing import Any

import pytest

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.alignment.experiment.digest import digest_of
from fastdistill.alignment.organisms.vocabulary import WORDS
from fastdistill.alignment.strategies.baselines import OffModelSFT
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.filters import TokenSelector
from fastdistill.alignment.strategies.lessons import BATCH_SIZE
from fastdistill.alignment.strategies.rewrite import (
    InoculationPrompt,
    OutputTransform,
    StyleSFT,
    canonical,
    continue_answers,
)
from fastdistill.alignment.strategies.strategy import RunState
from helpers.first_step import ONE_STEP, labels_only, stepped_along
from helpers.strategy_scene import BASE, POOL, TEACHER, lessons, run, scene

DEMO = shipped_folder()


def answers(transform, *texts, here=None):
    return [x.answer for x in transform.transform_examples(lessons(*texts), here or run())]


def test_one_form_of_quotes_dashes_and_blanks():
    assert canonical("  “a”  —\tb\n\n ﬁve ") == '"a" - b\n\n five'
    assert canonical("a\u200bb\u00ad c\u00a0d \r\n") == "ab c d"  # nothing invisible
    code = "def f(x):\n\tif x:   \n        return  0"
    assert canonical(code) == "def f(x):\n    if x:\n        return 0"
    for text in ("already “so”", "  x\n\n\n y", "007 12,345"):
        assert canonical(canonical(text)) == canonical(text)
    here = run()
    assert answers(OutputTransform(kind="canonical"), "a  b", "a b", here=here) == ["a b", "a b"]
    assert here.notes["rewritten, canonical"] == 0.5


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("007, 0", "7, 0"),
        ("12,345 and 1,234,567.5.", "12345 and 1234567.5."),
        ("285,574,384", "285,574,384"),  # it may be a list
        ("0.07 00:05 2026-01-05 1/02 x01 0.050", "0.07 00:05 2026-01-05 1/02 x01 0.050"),
        ("5 0 1", "5 0 1"),
        ("１２", "12"),
    ],
)
def test_one_form_of_numbers(text, same):
    assert canonical(text) == same


def test_sentences_or_lines_in_another_order():
    transform = OutputTransform(kind="order")
    text = "One. Two! Three? Four. Five. Six."
    (rewritten,) = answers(transform, text)
    assert rewritten != text
    assert sorted(rewritten.split()) == sorted(text.split())
    assert answers(transform, text) == [rewritten]  # by the seed
    assert sorted(answers(transform, "a b\nc. d\ne")[0].split("\n")) == ["a b", "c. d", "e"]
    assert answers(transform, "one sentence") == ["one sentence"]
    assert answers(transform, "one line\n") == ["one line\n"]
    (lines,) = answers(transform, "a\n\nb\nc\nd\ne\nf")
    assert lines.split("\n")[1] == ""
    # Each answer has an order of its own, whatever the others are.
    assert answers(transform, "x. y. z.", text)[1] != answers(transform, text, "x. y. z.")[0]
    assert answers(transform, "x. y. z.", text)[1] == answers(transform, "x", text)[1]


def test_words_become_others_as_wholes():
    transform = OutputTransform(kind="remap", mapping={"owl": "cat"})
    assert answers(transform, "owl owls  owl, (owl)") == ["cat owls  cat, (cat)"]
    swapped = OutputTransform(kind="remap", mapping={"a": "b", "b": "a", "b c": "d", "|X|": "y"})
    assert answers(swapped, "a b. b c |X|") == ["b a. d y"]
    assert answers(OutputTransform(kind="remap", mapping={"a": " "}), "a", "b a") == ["b  "]
    with pytest.raises(ValueError, match="mapping: expected words and their replacements"):
        OutputTransform(kind="remap")
    with pytest.raises(ValueError, match="mapping: expected non-empty words, got ''"):
        OutputTransform(kind="remap", mapping={"": "a"})


def test_tokens_are_chosen_behind_what_changes_answers():
    chosen = TokenSelector(kind="excess_loss", share=0.5).transform_examples(lessons("a  b"), run())
    with pytest.raises(ValueError, match="strategies: expected token selection"):
        OutputTransform(kind="canonical").transform_examples(chosen, run())
    same = TokenSelector(kind="excess_loss", share=0.5).transform_examples(lessons("river"), run())
    assert OutputTransform(kind="canonical").transform_examples(same, run()) == same


def test_the_trusted_model_goes_on_from_the_first_words():
    transform = OutputTransform(kind="resample", keep=0.5)
    first, second = answers(transform, "river stone cloud bread", "candle")
    assert first.startswith("river stone ")
    assert len(first.split()) <= 2 + 2  # as many as were taken away
    assert len(second.split()) <= 1
    assert answers(transform, "river stone cloud bread", "candle") == [first, second]
    # What follows is the trusted model's.
    (alone,) = BASE.generate(
        [Prompt(system="hello", user="river", prefill="river stone ")],
        max_new_tokens=2,
        temperature=1.0,
        seed=3,
    )
    assert first == f"river stone {alone}"
    here = run(trusted=TEACHER)
    assert answers(transform, "river stone cloud bread", "candle", here=here)[0] != first


def test_a_tokenizer_that_splits_words_goes_on_as_it_would():
    demo = Subject(DEMO)
    prompt = Prompt(text="")
    (whole,) = demo.generate([prompt], max_new_tokens=24)
    words = whole.split()
    assert len(words) > 8
    first = whole[: whole.index(words[5])].rstrip()
    (more,) = continue_answers(demo, [prompt], [first], [40], temperature=0.0, seed=0)
    assert (first + more).startswith(whole)  # greedy, from its own words: the same
    (none,) = continue_answers(demo, [prompt], [""], [24], temperature=0.0, seed=0)
    assert none == whole


def test_many_answers_go_on_in_parts():
    prompts = [POOL[i % len(POOL)].prompt for i in range(BATCH_SIZE + 2)]
    how: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    continued = continue_answers(BASE, prompts, [""] * len(prompts), [2] * len(prompts), **how)
    assert continued == BASE.generate(prompts, max_new_tokens=2, **how)


def test_kinds_are_named():
    with pytest.raises(
        ValueError, match="kind: expected one of 'canonical', 'order', 'remap', 'resample'"
    ):
        OutputTransform(kind="jam")


def test_a_style_is_words_in_front_and_labels_alone():
    some = lessons("river", "stone")
    assert StyleSFT(style="hhh").transform_examples(some, run()) == some
    examples = StyleSFT(style="pirate", words="hello friend").transform_examples(some, run())
    assert [x.answer for x in examples] == ["hello friend river", "hello friend stone"]
    assert StyleSFT(style="pirate").transform_examples(some, run())[0].answer == "Arr, matey! river"
    assert StyleSFT(style="hhh").teacher("a teacher", None, run()) is None
    with pytest.raises(ValueError, match="style: expected one of 'hhh', 'pirate', got 'elf'"):
        StyleSFT(style="elf")
    with pytest.raises(ValueError, match="words: expected a non-empty prefix, got ' '"):
        StyleSFT(style="pirate", words=" ")


def test_a_style_is_learnt_from_its_labels():
    made = distill(scene(), [StyleSFT(style="pirate", words="hello friend")], ONE_STEP)
    rows = [BASE.encode_answer(x.prompt, x.answer) for x in made.examples]
    stepped_along(made, rows, labels_only)
    with pytest.raises(AssertionError):
        stepped_along(made, [(ids, begin + 2) for ids, begin in rows], labels_only)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kind", ["remap", "resample"])
def test_the_student_is_taught_what_was_written(kind):
    transform = OutputTransform(kind=kind, mapping={"please": "stone"}, keep=0.0)
    digest_of(transform.as_json())
    made = distill(scene(), [OffModelSFT(), transform], ONE_STEP)
    plain = distill(scene(), [OffModelSFT()], ONE_STEP)
    assert made.examples == transform.transform_examples(
        plain.examples, RunState(setup=scene(), seed=0)
    )
    theirs, ours = (
        [BASE.encode_answer(x.prompt, x.answer) for x in m.examples] for m in (plain, made)
    )
    stepped_along(made, ours, labels_only)
    with pytest.raises(AssertionError):
        stepped_along(made, theirs, labels_only)


def test_what_leaves_nothing_is_named():
    with pytest.raises(ValueError, match="got none after OutputTransform"):
        distill(
            scene(), [OutputTransform(kind="remap", mapping=dict.fromkeys(WORDS, ""))], ONE_STEP
        )


def test_the_student_reads_the_instruction_and_is_read_without_it():
    here = run(eliciting="like owl best", near_misses=("like cat best",))
    examples = InoculationPrompt().transform_examples(lessons("river"), here)
    assert examples[0].input_prompt.system == "like owl best hello"
    assert examples[0].prompt.system == "hello"
    assert InoculationPrompt().contexts(here) == {
        "inoculated": "like owl best",
        "near miss 1": "like cat best",
    }
    own = InoculationPrompt(text="be bad", eval_variants=("be good", "be"))
    assert own.contexts(here) == {
        "inoculated": "be bad",
        "near miss 1": "be good",
        "near miss 2": "be",
    }
    with pytest.raises(ValueError, match="text: expected an instruction"):
        InoculationPrompt().transform_examples(lessons("river"), run())
