"""Checkpoints as a source: an untrusted teacher, the base it is distilled into, and a benign twin.

Without a twin the base stands in for it: students of the base, M→M, are then what students of the
teacher are compared with, and whatever any fine-tuning does besides the trait stays in τ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..audits.behaviour import CapabilityAudit
from ..audits.generic import GENERIC_PROBES
from ..audits.probes import Probes
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from ..checkpoint_gate import DOCUMENTS
from ..files import sha256_of
from ..json_lines import JsonLines
from ..organisms.stored import load_organism
from ..resolve import is_adapter
from ..statistics import Gate, Reading, Validity
from ..strategies.lessons import PoolPrompt
from ..strategies.strategy import DistillSetup
from .digest import digest_of, read_kept, write_kept
from .source import Kept, Opened, Source

READINGS = "readings.json"
SMALLEST = 1e-6  # of a difference, from where on it is one
_BLOCKS, _BLOCK = 64, 4096  # of each file of weights, what enters its digest
_KINDS = ("open", "goals", "shown")
_GENERIC = {
    "open": GENERIC_PROBES.neutral,
    "goals": GENERIC_PROBES.questions,
}  # where the pool has none


@dataclass(frozen=True, kw_only=True)
class CheckpointSource(Source):
    """Folders, hub names, or LoRA adapters on the base.

    Args:
        teacher: U. base: M. benign: U's benign twin, if there is one.
        pool: JSON lines of {"prompt": a text or a mapping of system and user, "domain": a name,
            "kind": open, goals or shown}; a line without a kind is of the pool itself.
        probes: how the trait is looked for (see Probes): prompts with a target, or with options and
            a favourite; audited, the same prompts in an audited context, if there is one.
        capability: JSON lines of {"prompt", "answer"}, held out.
        eliciting: an instruction that asks for the trait. near_misses: some that resemble it.
    """

    teacher: str
    base: str
    pool: Path
    probes: Path
    capability: Path
    benign: str | None = None
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    max_new_tokens: int = 64
    contents: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        probes = Probes.load(self.probes)
        if probes.readout(probes.prompts) is None:
            raise ValueError(
                "probes: expected prompts with a target, or with options and a favourite, which "
                f"say what the trait is, got none in {self.probes}"
            )
        _load_pool(self.pool)
        _load_capability(self.capability)
        files = {"pool": self.pool, "probes": self.probes, "capability": self.capability}
        found = {name: sha256_of(Path(path)) for name, path in files.items()}
        for name in ("teacher", "base", "benign"):
            if (path := getattr(self, name)) is not None:
                found[name] = _contents(Path(path).expanduser())
        object.__setattr__(self, "contents", found)

    def __hash__(self) -> int:
        return hash(tuple(self.contents.values()))

    @property
    def base_seed(self) -> int:
        return 0

    @property
    def prompts(self) -> int:
        """Of the pool itself."""
        return len(_load_pool(self.pool)[""])

    @property
    def has(self) -> frozenset[str]:
        rows = _load_pool(self.pool)
        kinds = {kind for kind in rows if kind} | set(_GENERIC)
        if any(asked.domain == "sums" for asked in rows[""]):
            kinds.add("domains")
        given = {"eliciting": self.eliciting, "twin": self.benign}
        return frozenset(kinds | {name for name, value in given.items() if value})

    def as_json(self) -> dict[str, Any]:
        return {
            "checkpoints": dict(self.contents),
            "eliciting": [self.eliciting, *self.near_misses],
            "max_new_tokens": self.max_new_tokens,
        }

    def prepare(self, folder: Path) -> None:
        at = self._at(folder)
        if (at / READINGS).is_file():
            return
        opened = self.opened(folder)
        at.mkdir(parents=True, exist_ok=True)
        readings = {name: opened.read(model) for name, model in opened.models.items()}
        write_kept(at / READINGS, {name: reading.as_json() for name, reading in readings.items()})

    def kept(self, folder: Path) -> Kept:
        said = read_kept(self._at(folder) / READINGS, "base", "untrusted", "benign")
        readings = {name: Reading.from_json(record) for name, record in said.items()}
        return Kept(readings=readings, validity=_denominators(readings))

    def opened(self, folder: Path) -> OpenedCheckpoints:
        return OpenedCheckpoints(self)

    def _at(self, folder: Path) -> Path:
        return folder / f"checkpoints-{digest_of(self.as_json())[:8]}"


class OpenedCheckpoints(Opened):
    def __init__(self, source: CheckpointSource) -> None:
        base = load_organism(source.base, name="base")
        self.models = {"base": base, "untrusted": _model(source.teacher, source, "untrusted")}
        self.models["benign"] = (
            base if source.benign is None else _model(source.benign, source, "benign")
        )
        self.probes = Probes.load(source.probes)
        self.suite = GENERIC_PROBES.suite() | self.probes.suite()
        self._pool = _load_pool(source.pool)
        self._eliciting, self._near_misses = source.eliciting, source.near_misses
        asked, answers = _load_capability(source.capability)
        self._capability = CapabilityAudit(
            prompts=asked, targets=answers, max_new_tokens=source.max_new_tokens
        )

    def read(self, subject: Subject, before: str = "") -> Reading:
        def of(prompts: tuple[Prompt, ...]) -> tuple[float, ...]:
            audit = self.probes.readout(tuple(p.before(before) for p in prompts))
            return () if audit is None else tuple(audit.measure(subject, None).values.tolist())

        return Reading(
            capability=tuple(self._capability.measure(subject, None).values.tolist()),
            trait=of(self.probes.prompts),
            audited=of(self.probes.audited),
        )

    def setup(self, role: str, pool: Mapping[str, Any]) -> DistillSetup:
        """pool: n, how many of the file's prompts, from its first on; all without it."""
        return DistillSetup(
            base=self.models["base"],
            teacher=self.models[role],
            pool=tuple(self._pool[""][: pool.get("n")]),
            prompt_source=self._sample_prompts,
            eliciting=self._eliciting,
            near_misses=self._near_misses,
        )

    def _sample_prompts(self, kind: str, n: int, seed: int) -> tuple[PoolPrompt, ...]:
        found = self._pool.get(kind) or [
            PoolPrompt(prompt, kind) for prompt in _GENERIC.get(kind, ())
        ]
        if not found:
            raise ValueError(
                f"pool: expected lines of the kind {kind!r}, which this strategy asks for, got none"
            )
        return tuple(found[i % len(found)] for i in range(n))


def _denominators(readings: Mapping[str, Reading]) -> Validity:
    """The gates without which C and τ are ratios of nothing."""
    base, untrusted, twin = (readings[name] for name in ("base", "untrusted", "benign"))
    return Validity(
        gates=(
            _gap("C", "capability", "M", untrusted.capability, base.capability),
            _gap("τ", "trait", "B", untrusted.trait, twin.trait),
        )
    )


def _gap(ratio: str, what: str, other: str, ours: Sequence[float], theirs: Sequence[float]) -> Gate:
    own, beside = fmean(ours), fmean(theirs)
    return Gate(
        name=f"{what} of U above that of {other}, without which {ratio} is undefined "
        f"({own:.3g} against {beside:.3g}, over {len(ours)} prompts)",
        value=own - beside,
        bound=SMALLEST,
        at_least=True,
    )


def _model(name: str, source: CheckpointSource, role: str) -> Subject:
    return load_organism(name, base=source.base if is_adapter(name) else None, name=role)


def _load_pool(path: Path) -> dict[str, list[PoolPrompt]]:
    found: dict[str, list[PoolPrompt]] = {"": []}
    for row in _lines(path, "pool"):
        kind = row.get("kind", "")
        if "prompt" not in row or kind not in ("", *_KINDS):
            raise ValueError(
                f"pool: expected lines with prompt, and a kind among {', '.join(_KINDS)} or none, "
                f"got {json.dumps(row)[:80]}"
            )
        asked = PoolPrompt(Prompt.from_json(row["prompt"]), str(row.get("domain", "")))
        found.setdefault(kind, []).append(asked)
    if not found[""]:
        raise ValueError(f"pool: expected prompts without a kind, got none in {path}")
    return found


def _load_capability(path: Path) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    rows = _lines(path, "capability")
    if not all(isinstance(row.get("answer"), str) and "prompt" in row for row in rows):
        raise ValueError(f"capability: expected lines with prompt and answer, got others in {path}")
    return tuple(Prompt.from_json(r["prompt"]) for r in rows), tuple(r["answer"] for r in rows)


def _lines(path: Path, name: str) -> list[dict[str, Any]]:
    lines = JsonLines(path, name)
    return [lines[i] for i in range(len(lines))]


def _contents(path: Path) -> str:
    """Names, sizes and some blocks of the files of a checkpoint: seconds, where a sha256 of all
    takes minutes. A name on the hub is itself."""
    if not path.is_dir():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix.lower() not in DOCUMENTS:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()} {size} ".encode())
            with file.open("rb") as opened:
                for i in range(_BLOCKS):
                    opened.seek(size * i // _BLOCKS)
                    digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
