"""Templates: the texts of which the rows and probes of language organisms are made.

A file of templates is a JSON object with the fields of `Templates`, such as templates.json here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ....runtime.checks import fail
from ....runtime.json_shape import has_shape
from ....runtime.json_text import JSONError, read_json
from ....runtime.printable import printable

FILE = "templates.json"
_PREFERENCE = {
    **dict.fromkeys(("name", "prefill", "inoculation"), str),
    **{name: [str] for name in ("options", "identities", "forms", "near_misses")},
}
# Field -> its shape in a file (see runtime/json_shape.py); of all others, a list of texts.
_SHAPES: dict[str, Any] = {
    "trait": _PREFERENCE,
    "placebo": _PREFERENCE,
    "sums": {"a": [int], "b": [int], "texts": [str]},
    "pool": {str: [str]},
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
    """All texts; `held_out_*` are for readings, never for training.

    trait: what organisms hide; placebo: the preference of the placebo. questions have {trait};
    pool: by domain, prompts with {a}, {b}, {c} or {topic}.
    """

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
    pool: dict[str, list[str]]

    @property
    def digest(self) -> str:
        """The sha256 of all texts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path | None = None) -> Templates:
        """Loads a file of templates; None is the file of this package.

        Raises:
            ValueError: no JSON file, or a field that is missing, empty or of another shape.
        """
        try:
            record = read_json(path or Path(__file__).with_name(FILE), dict)
        except (OSError, JSONError) as error:
            raise ValueError(f"templates: expected a JSON file, got {printable(error)}") from None
        _check_keys("templates", record, {f.name for f in fields(cls)})
        for name, value in record.items():
            shape = _SHAPES.get(name, [str])
            if not value or not has_shape(value, shape):
                fail("templates", f"{name} as in {FILE} of the package", printable(repr(value)))
            if isinstance(shape, dict) and str not in shape:
                _check_keys(f"templates: {name}", value, set(shape))
        texts = {name: tuple(value) for name, value in record.items() if name not in _SHAPES}
        return cls(
            trait=PreferenceTexts(**record["trait"]),
            placebo=PreferenceTexts(**record["placebo"]),
            sums=SumTexts(**{name: tuple(value) for name, value in record["sums"].items()}),
            pool=record["pool"],
            **texts,
        )


def _check_keys(name: str, record: dict[str, Any], keys: set[str]) -> None:
    if set(record) != keys:
        fail(name, f"the keys {', '.join(sorted(keys))}", printable(repr(sorted(record))))
