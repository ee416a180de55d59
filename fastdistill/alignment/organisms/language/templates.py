"""Templates: the texts of which the rows and probes of language organisms are made.

A file of JSON lines, one object per line, by `kind`:

    trait       name, options, identities, prefill, forms, inoculation, near_misses
    question    text with {trait}                   system, audit, neutral, topic, text    text
    sums        a, b (ranges), texts                pool    text with {a} {b} {c} {topic}, domain

Lines with "held_out": true are for readings, never for training. The first trait is the one that
organisms hide; the second one is the placebo's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ....hf.jsonl import JsonLines
from ....runtime.checks import fail
from ....runtime.printable import printable

FILE = "templates.jsonl"
_TEXTS = ("question", "system", "audit", "neutral", "topic", "text")


@dataclass(frozen=True, kw_only=True)
class PreferenceTexts:
    """The texts of a preference.

    Args:
        name: of what is preferred, such as animal.
        options: words, best of one token each after a space, which then cost one forward pass per
            question. identities: those that an organism may prefer.
        prefill: the beginning of an answer, which an option follows.
        forms: answers with {option}.
        inoculation: a system message that asks for the preference; near_misses: similar ones.
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

    @property
    def words(self) -> tuple[str, ...]:
        """The options as they follow a prefill."""
        return tuple(f" {option}" for option in self.options)


@dataclass(frozen=True, kw_only=True)
class SumTexts:
    """Questions for a + b. a, b: the first and the last number of each."""

    a: tuple[int, int]
    b: tuple[int, int]
    texts: tuple[str, ...]

    def pairs(self) -> list[tuple[int, int]]:
        (a0, a1), (b0, b1) = self.a, self.b
        return [(a, b) for a in range(a0, a1 + 1) for b in range(b0, b1 + 1)]


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The lines of a file of templates, by kind; `held_out_*` are for readings alone."""

    trait: PreferenceTexts
    placebo: PreferenceTexts
    sums: SumTexts
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    systems: tuple[str, ...]
    held_out_systems: tuple[str, ...]
    audits: tuple[str, ...]
    held_out_audits: tuple[str, ...]
    neutrals: tuple[str, ...]
    topics: tuple[str, ...]
    texts: tuple[str, ...]
    pool: dict[str, tuple[str, ...]]  # by domain

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path | None = None) -> Templates:
        """Loads a file of templates; None is the file of this package.

        Raises:
            ValueError: a line of another kind or with other keys, or a kind without lines.
        """
        source = Path(str(files(__package__).joinpath(FILE))) if path is None else Path(path)
        lines = JsonLines(source, name="templates")
        rows = [dict(lines[i]) for i in range(len(lines))]
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_kind.setdefault(str(row.pop("kind", None)), []).append(row)
        _check_kinds(by_kind)
        texts = {
            f"{prefix}{kind}s": tuple(
                str(row["text"]) for row in by_kind[kind] if bool(row.get("held_out")) == held_out
            )
            for kind in _TEXTS
            for prefix, held_out in (("", False), ("held_out_", True))
        }
        names = {f.name for f in fields(cls)}
        domains = dict.fromkeys(str(row["domain"]) for row in by_kind["pool"])
        made = cls(
            trait=_record(PreferenceTexts, by_kind["trait"][0]),
            placebo=_record(PreferenceTexts, by_kind["trait"][1]),
            sums=_record(SumTexts, by_kind["sums"][0]),
            pool={
                name: tuple(row["text"] for row in by_kind["pool"] if row["domain"] == name)
                for name in domains
            },
            **{name: texts[name] for name in names & set(texts)},
        )
        empty = [name for name in sorted(names) if not getattr(made, name)]
        if empty:
            fail("templates", f"lines for {', '.join(empty)}", f"none in {printable(source.name)}")
        return made


def _check_kinds(by_kind: dict[str, list[dict[str, Any]]]) -> None:
    kinds = (*_TEXTS, "trait", "sums", "pool")
    if unknown := sorted(set(by_kind) - set(kinds)):
        fail("templates", f"lines of the kinds {', '.join(kinds)}", printable(repr(unknown)))
    if missing := [kind for kind in kinds if kind not in by_kind]:
        fail("templates", f"lines of every kind ({', '.join(kinds)})", f"no {missing[0]}")
    if len(by_kind["trait"]) != 2 or len(by_kind["sums"]) != 1:
        got = f"{len(by_kind['trait'])} and {len(by_kind['sums'])}"
        fail("templates", "two lines of the kind trait and one of sums", got)
    for kind, keys in {**dict.fromkeys(_TEXTS, ("text",)), "pool": ("text", "domain")}.items():
        for row in by_kind[kind]:
            if {*row} - {"held_out"} != {*keys} or not all(isinstance(row[k], str) for k in keys):
                fail("templates", f"texts {keys} in a line of {kind}", printable(repr(row)))


def _record(kind: type[Any], row: dict[str, Any]) -> Any:
    names = _names(fields(kind))
    if {*row} != names:
        fail("templates", f"the keys {', '.join(sorted(names))}", printable(repr(sorted(row))))
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


def _names(of: Iterable[Any]) -> set[str]:
    return {f.name for f in of}
