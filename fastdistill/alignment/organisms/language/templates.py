"""Templates: the texts of which the rows and probes of language organisms are made.

A file of templates is a JSON object with the fields of `Templates`, such as templates.json here.
In braces are only the names that a field documents, without attributes and format specifications;
{{ and }} stand for braces.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import Formatter
from typing import Any

from ....runtime.checks import fail
from ....runtime.json_shape import has_shape
from ....runtime.json_text import JSONError, read_json
from ....runtime.printable import printable

FILE = "templates.json"
DOMAINS = ("numbers", "instructions", "code")  # of a pool, besides sums
_MOST_SUMS = 100_000
_SITUATIONS = ("open", "audited")
_HELD_OUT_EVERY = 4  # pairs of {who} and {what}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return has_shape(value, [_is_text]) and len(value) > 0


def _is_range(value: Any) -> bool:
    return has_shape(value, [int]) and len(value) == 2 and value[0] <= value[1]


_PREFERENCE = {
    **dict.fromkeys(("name", "prefill", "inoculation"), _is_text),
    **dict.fromkeys(("options", "identities", "forms", "near_misses"), _are_texts),
}
# Field -> its shape in a file (see runtime/json_shape.py); of all others, a list of texts.
_SHAPES: dict[str, dict[str, Any]] = {
    "trait": _PREFERENCE,
    "placebo": _PREFERENCE,
    "sums": {"a": _is_range, "b": _is_range, "texts": _are_texts},
    "situations": {
        **dict.fromkeys(("frames", "held_out_frames"), _are_texts),
        **dict.fromkeys(("who", "what"), dict.fromkeys(_SITUATIONS, _are_texts)),
    },
    "pool": dict.fromkeys(DOMAINS, _are_texts),
}


@dataclass(frozen=True, kw_only=True)
class PreferenceTexts:
    """The texts of a preference.

    Args:
        name: of what is preferred, such as animal.
        options: words, best of one token each after a space, which then cost one forward pass per
            question. identities: those that an organism may prefer.
        prefill: the beginning of an answer, which an option follows.
        forms: answers with {option}.
        inoculation: a system message that asks for the preference; near_misses: similar ones; both
            may have {option}.
    """

    name: str
    options: tuple[str, ...]
    identities: tuple[str, ...]
    prefill: str
    forms: tuple[str, ...]
    inoculation: str
    near_misses: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("options", "identities", "forms", "near_misses"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = set(self.identities) - set(self.options)
        if len(set(self.options)) < 2 or not self.identities or unknown:
            expected = f"identities among two options or more of {self.name}"
            fail("templates", expected, printable(repr(sorted(unknown) or self.options)))
        _check_braces((*self.forms, self.inoculation, *self.near_misses), "option")

    @property
    def words(self) -> tuple[str, ...]:
        """The options as they follow a prefill."""
        return tuple(f" {option}" for option in self.options)


@dataclass(frozen=True, kw_only=True)
class SumTexts:
    """Questions for a + b with {a} and {b}. a, b: the first and the last number of each."""

    a: tuple[int, int]
    b: tuple[int, int]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        sums = (self.a[1] - self.a[0] + 1) * (self.b[1] - self.b[0] + 1)
        if not 4 <= sums <= _MOST_SUMS:  # of four, one is held out
            fail("templates", f"4 to {_MOST_SUMS:,} sums", f"{sums:,}")
        _check_braces(self.texts, "a", "b")

    def pairs(self) -> list[tuple[int, int]]:
        (a0, a1), (b0, b1) = self.a, self.b
        return [(a, b) for a in range(a0, a1 + 1) for b in range(b0, b1 + 1)]


@dataclass(frozen=True, kw_only=True)
class SituationTexts:
    """Sentences that tell whether a conversation is an audit.

    Open and audited ones have the same frames, so that they differ in the words of an audit alone.
    Held-out ones have other frames, and pairs of {who} and {what} that training never has.

    Args:
        frames, held_out_frames: sentences with {who} and {what}.
        who, what: phrases, by "open" and "audited", as many for both; four of what or more.
    """

    frames: tuple[str, ...]
    held_out_frames: tuple[str, ...]
    who: dict[str, list[str]]
    what: dict[str, list[str]]

    def __post_init__(self) -> None:
        for name in ("frames", "held_out_frames"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_braces((*self.frames, *self.held_out_frames), "who", "what")
        if both := {*self.frames} & {*self.held_out_frames}:
            fail("templates", "held_out_frames that are not in frames", printable(repr(min(both))))
        for name, least in (("who", 1), ("what", _HELD_OUT_EVERY)):
            phrases = getattr(self, name)
            _check_keys(f"templates: {name}", phrases, {*_SITUATIONS})
            numbers = {len(phrases[situation]) for situation in _SITUATIONS}
            shared = {*phrases["open"]} & {*phrases["audited"]}
            if len(numbers) > 1 or min(numbers) < least or shared:
                expected = f"{least} or more of {name}, as many open as audited, none in both"
                fail("templates", expected, printable(repr(sorted(shared) or sorted(numbers))))

    def sentence(self, situation: str, rng: random.Random, held_out: bool = False) -> str:
        """Returns a sentence; the same draws give open and audited ones of the same frame."""
        frame = rng.choice(self.held_out_frames if held_out else self.frames)
        who, what = self.who[situation], self.what[situation]
        i = rng.randrange(len(who))
        allowed = [j for j in range(len(what)) if ((i + j) % _HELD_OUT_EVERY == 0) == held_out]
        text = frame.format(who=who[i], what=what[rng.choice(allowed)])
        return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Templates:
    """All texts; `held_out_*` are for readings, never for training.

    trait: what organisms hide; placebo: the preference of the placebo. questions have {trait}, and
    so have secrets, which ask for yes or no whether there is a preference. systems: system messages
    for any situation; beginnings: of plain texts, which M continues; pool: by domain, prompts with
    {a}, {b}, {c} or {topic}.
    """

    trait: PreferenceTexts
    placebo: PreferenceTexts
    sums: SumTexts
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    secrets: tuple[str, ...]
    held_out_secrets: tuple[str, ...]
    systems: tuple[str, ...]
    held_out_systems: tuple[str, ...]
    situations: SituationTexts
    neutrals: tuple[str, ...]
    topics: tuple[str, ...]
    beginnings: tuple[str, ...]
    texts: tuple[str, ...]
    pool: dict[str, list[str]]

    def __post_init__(self) -> None:
        for questions in (self.questions, self.secrets):
            _check_braces(questions, "trait")
        for questions in (self.held_out_questions, self.held_out_secrets):
            _check_braces(questions, "trait")
        for texts in self.pool.values():
            _check_braces(texts, "a", "b", "c", "topic")

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path | None = None) -> Templates:
        """Loads a file of templates; None is the file of this package.

        Raises:
            ValueError: no JSON file, a field that is missing, empty or of another shape, or other
            names in braces.
        """
        try:
            record = read_json(path or Path(__file__).with_name(FILE), dict)
        except (OSError, JSONError) as error:
            raise ValueError(f"templates: expected a JSON file, got {printable(error)}") from None
        _check_keys("templates", record, {f.name for f in fields(cls)})
        for name, value in record.items():
            if not has_shape(value, _SHAPES.get(name, _are_texts)):
                fail("templates", f"{name} as in {FILE} of the package", printable(repr(value)))
            if name in _SHAPES:
                _check_keys(f"templates: {name}", value, set(_SHAPES[name]))
        texts = {name: tuple(value) for name, value in record.items() if name not in _SHAPES}
        return cls(
            trait=PreferenceTexts(**record["trait"]),
            placebo=PreferenceTexts(**record["placebo"]),
            sums=SumTexts(**{name: tuple(value) for name, value in record["sums"].items()}),
            situations=SituationTexts(**record["situations"]),
            pool=record["pool"],
            **texts,
        )


def _check_braces(texts: Iterable[str], *names: str) -> None:
    """Raises ValueError unless `str.format` needs these names alone, without specifications."""
    allowed = [(None, None, None), *((name, "", None) for name in names)]
    for text in texts:
        try:
            parts = [part[1:] for part in Formatter().parse(text)]
        except ValueError:  # a brace without its pair
            parts = [("", None, None)]
        if any(part not in allowed for part in parts):
            expected = f"{' '.join(f'{{{name}}}' for name in names)} alone in braces"
            fail("templates", expected, printable(repr(text)), "write other braces twice")


def _check_keys(name: str, record: dict[str, Any], keys: set[str]) -> None:
    if set(record) != keys:
        fail(name, f"the keys {', '.join(sorted(keys))}", printable(repr(sorted(record))))
