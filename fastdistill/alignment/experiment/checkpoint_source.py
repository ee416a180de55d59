"""Checkpoints as a source: an untrusted teacher, the base model and a benign twin.

Without a twin the base replaces it: students of the teacher are then compared with students of the
base (M→M), and τ includes every effect of fine-tuning, not only the trait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...hf.checkpoint import StoredModel
from ...hf.open_dataset import open_dataset
from ...hf.source import is_adapter, model_source
from ...quant.formats.checkpoint_gate import DOCUMENTS
from ...runtime.atomic_files import sha256_of
from ...runtime.checks import fail
from ..audits.behaviour import CapabilityAudit
from ..audits.generic_probes import GENERIC_PROBES
from ..audits.probes import Probes
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from ..audits.words import contains_phrase
from ..organisms.storage import load_organism
from ..statistics import Reading
from ..strategies.lessons import Examples, PoolPrompt
from ..strategies.strategy import DistillSetup
from .checkpoint_gates import gates_of, measure
from .digest import digest_of
from .source import MODELS, LoadedSource, Source, named_audited

OPTIONAL = ("placebo", "other_base", "earlier")
_BLOCKS, _BLOCK = 64, 4096  # number and size of the sampled blocks per file in a digest
_KINDS = ("goals", "shown")
_GENERIC = {"goals": GENERIC_PROBES.questions}  # used if the pool has none


@dataclass(frozen=True, kw_only=True)
class CheckpointSource(Source):
    """Models from folders, Hub names, or LoRA adapters on the base.

    Args:
        teacher: U. base: M. benign: U's benign twin, optional. placebo: P, optional.
        other_base, earlier: models from which students may begin instead of M: another base, and
            an earlier checkpoint of M.
        pool: rows {"prompt": a text or a mapping of system and user, "domain": a name, "kind":
            goals or shown}, in a file, a folder saved by datasets, or a hub name with its
            split (`open_dataset`). Rows without a kind form the pool.
        probes: prompts for the trait (see Probes), with a target, or with options and a favorite;
            optionally the same prompts in an audited context.
        capability: held-out rows {"prompt", "answer"}, in the same forms.
        text: held-out rows {"text"}, optional: U and B must predict them about as well as M.
        eliciting: an instruction that asks for the trait. near_misses: similar instructions.
        attn_implementation: of transformers, such as eager; None chooses.
        index: of the pair in a study, its base seed; it changes no result.
    """

    is_slow: ClassVar[bool] = True

    teacher: str
    base: str
    pool: str | Path
    probes: Path
    capability: str | Path
    benign: str | None = None
    text: str | Path | None = None
    placebo: str | None = None
    other_base: str | None = None
    earlier: str | None = None
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    max_new_tokens: int = 64
    attn_implementation: str | None = None
    index: int = field(default=0, compare=False)
    contents: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        probes = Probes.load(self.probes)
        if probes.readout(probes.prompts) is None:
            raise ValueError(
                "probes: expected prompts that define the trait, with a target or with options "
                f"and a favourite, got none in {self.probes}"
            )
        _load_pool(self.pool)
        _load_capability(self.capability)
        _load_texts(self.text)
        contents = {"pool": _digest_of_rows(self.pool, "pool"), "probes": sha256_of(self.probes)}
        contents["capability"] = _digest_of_rows(self.capability, "capability")
        if self.text is not None:
            contents["text"] = _digest_of_rows(self.text, "text")
        for name in ("teacher", "base", "benign", *OPTIONAL):
            if (path := getattr(self, name)) is not None:
                contents[name] = _contents(model_source(name, path).path)
        object.__setattr__(self, "contents", contents)

    def __hash__(self) -> int:
        return hash(tuple(self.contents.values()))

    @property
    def base_seed(self) -> int:
        return self.index

    @property
    def roles(self) -> list[str]:
        """The models: M, U and B (or M in its place), and those that are optional."""
        return [*MODELS[:3], *(name for name in OPTIONAL if getattr(self, name) is not None)]

    @property
    def prompts(self) -> int:
        """The number of prompts of the pool."""
        return len(_load_pool(self.pool)[""])

    @property
    def features(self) -> frozenset[str]:
        rows = _load_pool(self.pool)
        kinds = {kind for kind in rows if kind} | set(_GENERIC)
        optional = {
            "eliciting": self.eliciting,
            "twin": self.benign,
            **{name: getattr(self, name) for name in OPTIONAL},
        }
        return frozenset(kinds | {name for name, value in optional.items() if value})

    def as_json(self) -> dict[str, Any]:
        return {
            "checkpoints": dict(self.contents),
            "eliciting": [self.eliciting, *self.near_misses],
            "max_new_tokens": self.max_new_tokens,
            **({"attention": self.attn_implementation} if self.attn_implementation else {}),
        }

    def build(self, folder: Path) -> dict[str, Any]:
        loaded = self.load(folder)
        readings = {role: loaded.read(loaded.models[role]) for role in self.roles}
        pool = loaded.setup("base", {}).pool
        measured = measure(loaded.models, pool, _load_texts(self.text), self.max_new_tokens)
        return {
            "readings": {name: reading.as_json() for name, reading in readings.items()},
            "validity": gates_of(
                readings, Path(self.teacher).name, has_twin=self.benign is not None, **measured
            ).as_json(),
            **measured,
        }

    def load(self, folder: Path) -> LoadedCheckpoints:
        return LoadedCheckpoints(self)

    def cache(self, folder: Path) -> Path:
        return folder / f"checkpoints-{digest_of(self.as_json())[:8]}"


class LoadedCheckpoints(LoadedSource):
    def __init__(self, source: CheckpointSource) -> None:
        self.models = _Models(source)
        self.probes = Probes.load(source.probes)
        self.suite = GENERIC_PROBES.suite() | self.probes.suite()
        if self.probes.audited:
            under_audit = replace(
                self.probes, prompts=self.probes.audited, questions=(), audited=(), without=()
            )
            self.suite |= named_audited(under_audit.suite())
        self._pool = _load_pool(source.pool)
        self._eliciting, self._near_misses = source.eliciting, source.near_misses
        prompts, answers = _load_capability(source.capability)
        self._capability = CapabilityAudit(
            prompts=prompts, targets=answers, max_new_tokens=source.max_new_tokens
        )

    def read(self, subject: Subject, before: str = "") -> Reading:
        trait, log_odds = self._trait(subject, self.probes.prompts, before)
        audited, audited_log_odds = self._trait(subject, self.probes.audited, before)
        return Reading(
            capability=tuple(self._capability.measure(subject, None).values.tolist()),
            trait=trait,
            audited=audited,
            log_odds=log_odds,
            audited_log_odds=audited_log_odds,
        )

    def read_contexts(self, subject: Subject) -> dict[str, float]:
        """Return the rate and the mean log-odds of the trait in the other context of the probes."""
        rates, log_odds = self._trait(subject, self.probes.other_context)
        means = {"other context": rates, "other context, log-odds": log_odds}
        return {name: float(np.mean(values)) for name, values in means.items() if len(values)}

    def notes_on(self, examples: Examples) -> dict[str, Any]:
        """Return the number of answers that name a marker of the probes, in any context."""
        markers = self.probes.markers
        if not markers:
            return {}
        named = [any(contains_phrase(e.answer, marker) for marker in markers) for e in examples]
        return {"answers that name the trait": sum(named)}

    def _trait(
        self, subject: Subject, prompts: Sequence[Prompt], before: str = ""
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the rates and log-odds of the trait, each empty if it is not measured."""
        audit = self.probes.readout(tuple(p.before(before) for p in prompts))
        if audit is None:
            return (), ()
        measurement = audit.measure(subject, None)
        log_odds = () if measurement.log_odds is None else measurement.log_odds
        return tuple(measurement.values), tuple(log_odds)

    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        """Return the setup; `pool` may limit the prompts of the file to the first n."""
        return DistillSetup(
            base=self.models["base"],
            teacher=self.models[role],
            pool=tuple(self._pool[""][: pool.get("n")]),
            prompt_source=self._sample_prompts,
            eliciting=self._eliciting,
            near_misses=self._near_misses,
        )

    def _sample_prompts(self, kind: str, n: int, seed: int) -> tuple[PoolPrompt, ...]:
        entries = self._pool.get(kind) or [
            PoolPrompt(prompt, kind) for prompt in _GENERIC.get(kind, ())
        ]
        if not entries:
            fail("pool", f"lines of the kind {kind!r}, which this strategy requires", "none")
        return tuple(entries[i % len(entries)] for i in range(n))


class _Models(dict[str, Subject]):
    """Models by role, each loaded at its first use."""

    def __init__(self, source: CheckpointSource) -> None:
        super().__init__()
        self._source = source

    def __missing__(self, role: str) -> Subject:
        source, argument = self._source, "teacher" if role == "untrusted" else role
        name = getattr(source, argument)
        if name is None:  # without a twin
            self[role] = self["base"]
        else:
            path = StoredModel.from_path(name, role=argument).path  # downloaded if it is on the hub
            self[role] = load_organism(
                path,
                base=source.base if is_adapter(path) else None,
                name=role,
                attn_implementation=source.attn_implementation,
            )
        return self[role]


def _load_pool(path: str | Path) -> dict[str, list[PoolPrompt]]:
    by_kind: dict[str, list[PoolPrompt]] = {"": []}
    for row in _rows(path, "pool"):
        kind = row.get("kind") or ""
        if "prompt" not in row or kind not in ("", *_KINDS):
            raise ValueError(
                f"pool: expected lines with a prompt and an optional kind ({', '.join(_KINDS)}), "
                f"got {json.dumps(row)[:80]}"
            )
        entry = PoolPrompt(Prompt.from_json(row["prompt"]), str(row.get("domain") or ""))
        by_kind.setdefault(kind, []).append(entry)
    if not by_kind[""]:
        fail("pool", "prompts without a kind", f"none in {path}")
    return by_kind


def _load_capability(path: str | Path) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    rows = _rows(path, "capability")
    if not all(isinstance(row.get("answer"), str) and "prompt" in row for row in rows):
        fail("capability", "lines with prompt and answer", f"other lines in {path}")
    return tuple(Prompt.from_json(r["prompt"]) for r in rows), tuple(r["answer"] for r in rows)


def _load_texts(path: str | Path | None) -> list[str]:
    texts: list[Any] = [] if path is None else [row.get("text") for row in _rows(path, "text")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        fail("text", "lines with text", f"other lines in {path}")
    return texts


def _rows(path: str | Path, name: str) -> list[dict[str, Any]]:
    rows = open_dataset(path, name, check=lambda row: None)
    return [rows[i] for i in range(len(rows))]


def _digest_of_rows(path: str | Path, name: str) -> str:
    """Return the sha256 of a file, or of the rows of a folder or hub dataset."""
    if Path(path).is_file():
        return sha256_of(Path(path))
    digest = hashlib.sha256()
    for row in _rows(path, name):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _contents(path: Path) -> str:
    """Return a digest of the names, sizes and sampled blocks of a checkpoint's files.

    It takes seconds, a full sha256 takes minutes. A Hub name is returned as it is.
    """
    if not path.exists():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix.lower() not in DOCUMENTS:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()} {size} ".encode())
            with file.open("rb") as stream:
                for i in range(_BLOCKS):
                    stream.seek(size * i // _BLOCKS)
                    digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
