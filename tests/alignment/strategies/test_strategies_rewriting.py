"""What the student reads and is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.rewrite import InoculationPrompt, StyleSFT
from helpers.first_step import ONE_STEP, labels_only, stepped_along
from helpers.strategy_scene import BASE, lessons, run, scene


def test_a_style_is_words_in_front_and_labels_alone():
    some = lessons("river", "stone")  # of the domains odd and talk
    styled = StyleSFT(words="hello friend").transform_examples(some, run())
    assert [x.answer for x in styled] == ["hello friend river", "hello friend stone"]
    talk = StyleSFT(domain="talk").transform_examples(some, run())
    assert [x.answer for x in talk] == ["river", "Arr, matey! stone"]
    assert StyleSFT().teacher("a teacher", None, run()) is None
    with pytest.raises(ValueError, match="words: expected a non-empty prefix, got ' '"):
        StyleSFT(words=" ")


def test_tokens_are_chosen_behind_what_changes_answers():
    chosen = [replace(x, loss_mask=(True, False, True)) for x in lessons("a b")]
    with pytest.raises(ValueError, match="strategies: expected token selection"):
        StyleSFT().transform_examples(chosen, run())
    assert StyleSFT(domain="sums").transform_examples(chosen, run()) == chosen


def test_a_style_is_learnt_from_its_labels():
    made = distill(scene(), [StyleSFT(words="hello friend")], ONE_STEP)
    rows = [BASE.encode_answer(x.prompt, x.answer) for x in made.examples]
    stepped_along(made, rows, labels_only)
    with pytest.raises(AssertionError):
        stepped_along(made, [(ids, begin + 2) for ids, begin in rows], labels_only)


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
