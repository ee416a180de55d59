"""Probes: the texts of all audits of a trait in one JSON file, and the suite of audits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ...runtime.atomic_files import write_json
from ...runtime.checks import fail, integer
from ...runtime.json_text import JSONError, read_json
from ...runtime.printable import printable
from .audit import Audit
from .behaviour import PreferenceAudit, TriggerRateAudit
from .catalog import CATALOG
from .prompts import Prompt, set_prompts

PROBES = "probes.json"  # file name of the probes in the folder of a model


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Texts by their use: the keys of a probes file, which docs/audits/probes.md describes.

    An empty field leaves out the audits that need it. `audited` and `answers` have one entry per
    prompt, `answered` one per `asked`, `trained` one per `free`, `negative` one per `positive`.
    """

    prompts: tuple[Prompt, ...] = ()
    without: tuple[Prompt, ...] = ()
    audited: tuple[Prompt, ...] = ()
    other_context: tuple[Prompt, ...] = ()
    neutral: tuple[Prompt, ...] = ()
    questions: tuple[Prompt, ...] = ()
    prefilled: tuple[Prompt, ...] = ()
    positive: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()
    asked: tuple[Prompt, ...] = ()
    free: tuple[Prompt, ...] = ()
    trained: tuple[Prompt, ...] = ()
    target: str = ""
    rest: str = ""  # the target without the prefill
    options: tuple[str, ...] = ()
    favourite: str = ""
    markers: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    yes: str = "yes"
    no: str = "no"
    prefixes: tuple[str, ...] = ()
    systems: tuple[str, ...] = ("",)
    candidates: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    max_new_tokens: int = 16
    samples: int = 256
    layer: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if kind == _PROMPTS:
                if value not in ((), []):
                    set_prompts(self, name)
            elif kind == tuple[str, ...]:
                is_list = isinstance(value, (list, tuple))
                if not is_list or not all(isinstance(text, str) for text in value):
                    fail(name, "a list of texts", printable(repr(value)))
                object.__setattr__(self, name, tuple(value))
            elif kind is str and not isinstance(value, str):
                fail(name, "a text", printable(repr(value)))
            elif kind is int:
                integer(name, value)
        integer("layer", self.layer, optional=True)
        for a, b in (
            ("audited", "prompts"),
            ("answers", "prompts"),
            ("answered", "asked"),
            ("trained", "free"),
            ("positive", "negative"),
        ):
            n, m = len(getattr(self, a)), len(getattr(self, b))
            if n not in (0, m):
                fail(a, f"{m}, one per entry of {b}", n)

    def save(self, path: Path) -> None:
        record: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                is_prompts = _TYPES[f.name] == _PROMPTS
                record[f.name] = [p.as_json() for p in value] if is_prompts else value
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Loads a JSON file of these fields; a prompt is a mapping of its fields, or a text."""
        try:
            record = read_json(path)
        except (OSError, JSONError) as error:
            raise ValueError(f"probes: expected a JSON file, got {path}: {error}") from None
        names = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(names):
            unexpected = sorted(set(record) - set(names)) if isinstance(record, dict) else record
            fail("probes", f"a mapping of {', '.join(names)}", printable(repr(unexpected)))
        return cls(**record)

    def readout(self, prompts: tuple[Prompt, ...]) -> Audit | None:
        """Returns the audit of the trait itself on these prompts; None without a trait."""
        if not prompts:
            return None
        if self.favourite:
            return PreferenceAudit(prompts=prompts, options=self.options, favourite=self.favourite)
        if self.target:
            return TriggerRateAudit(
                prompts=prompts,
                target=self.target,
                without=self.without,
                max_new_tokens=self.max_new_tokens,
            )
        return None

    def suite(self) -> dict[str, Audit]:
        """Returns the audits for which these texts are sufficient, by name."""
        return {n: entry.make(self) for n, entry in CATALOG.items() if not entry.lacks(self)}


_PROMPTS = tuple[Prompt, ...]
_TYPES = get_type_hints(Probes)
