"""The records of a study: one compressed file from which its report is computed.

Each line is a JSON object. The first describes the study. A `student` line has the mean readings of
a pair of students and of their base and teachers, and the digests of both runs. C, τ and κ are
ratios of means, so the readings of single items are not needed.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from ...runtime.atomic_files import write_atomically
from ...runtime.json_shape import has_shape
from ...runtime.json_text import parse_json, read_bounded
from ...runtime.printable import printable
from ..report.audit_scores import AuditScore
from ..statistics import Reading, Student, Validity
from .study import ContextRow, NoteRow, Study, Table

FILE = "records.jsonl.gz"
FORMAT = 1

_GATE = {"name": str, "value": (float, None), "bound": float, "at_least": bool}
_ARM = {"name": str, "role": str, "description": str, "strategies": [str]}
_HEAD = {
    "study": {
        "title": str,
        "measured": str,
        "limits": [str],
        "arms": lambda arms: has_shape(arms, [_ARM]) and bool(arms),
    },
    "about": {
        "command": str,
        "config": {str: Any},
        "versions": {str: (str, None)},
        "seeds": Any,
        "limits?": [str],
        "rule?": (None, lambda rule: has_shape(rule, {"claimed": [str]})),
    },
    "validity": {str: {"gates": [_GATE]}},
    "left_out": {str: str},
    "refused": {str: [str]},
    "runs": int,
    "planned?": int,  # not in records of earlier versions, which are of finished studies
}
_SCORE = {
    "audit": str,
    "arm": str,
    "base_seed": int,
    "student_seed": int,
    "of_untrusted": float,
    "of_benign": float,
}
_LINES: dict[str, Any] = {
    "student": {str: Any},  # checked by Student.from_json
    "score": _SCORE,
    "teachers": _SCORE,
    "development": _SCORE,
    "context": {
        "arm": str,
        "base_seed": int,
        "context": str,
        "of_untrusted": float,
        "of_benign": float,
    },
    "note": {"arm": str, "base_seed": int, "notes": {str: (float, bool)}},
}
_RUNS = {"student": {"runs": [str]}}  # what a line has besides


@dataclass(frozen=True, kw_only=True)
class Records:
    """What the report of a study is computed from.

    Attributes:
        study: title, measured, repairs, limits, and arms: name, role, description, strategies.
        about: command, config, versions, seeds and rule, for TransferReport.
    """

    study: dict[str, Any]
    about: dict[str, Any]
    table: Table


def write_records(study: Study, table: Table, about: Mapping[str, Any], folder: Path) -> None:
    """Write the records of a finished study."""
    arms = [
        {
            "name": arm.name,
            "role": arm.role,
            "description": arm.description,
            "strategies": [strategy.name for strategy in arm.strategies],
        }
        for arm in study.arms
        if arm.name not in table.left_out
    ]
    head = {
        "format": FORMAT,
        "study": {
            "title": study.title,
            "measured": study.measured,
            "repairs": study.repairs,
            "limits": list(study.limits),
            "arms": arms,
        },
        "about": dict(about),
        "left_out": table.left_out,
        "refused": table.refused,
        "validity": {seed: validity.as_json() for seed, validity in table.validity.items()},
        "runs": table.runs,
        "planned": table.planned,
    }
    lines: list[dict[str, Any]] = [head]
    lines += [
        {"student": means_of(student).as_json(), "runs": digests}
        for student, digests in zip(table.students, table.digests, strict=True)
    ]
    lines += [{"score": asdict(score)} for score in table.scores]
    lines += [{"teachers": asdict(score)} for score in table.teachers]
    lines += [{"development": asdict(score)} for score in table.development]
    lines += [{"context": row._asdict()} for row in table.contexts]
    lines += [{"note": {**row._asdict(), "notes": dict(numbers(row.notes))}} for row in table.notes]
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    write_atomically(folder / FILE, gzip.compress(text.encode(), mtime=0))


def read_records(path: Path) -> Records:
    """Return the records of a study.

    Raises:
        ValueError: the file is damaged, or has another format.
    """
    try:
        with gzip.open(path, "rb") as stream:
            text = read_bounded(cast(IO[bytes], stream), path.name)
        head, *lines = (parse_json(line, path.name, dict) for line in text.splitlines())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, error) from None
    if head.get("format") != FORMAT:
        got = printable(repr(head.get("format")), 80)
        raise ValueError(
            f"{printable(path)}: expected records of format {FORMAT}, got {got}; read them with "
            "the version of fastdistill that wrote them"
        )
    rows: dict[str, list[Any]] = {kind: [] for kind in _LINES}
    for line in lines:
        kind = next((kind for kind in _LINES if kind in line), None)
        if kind is None or not has_shape(line, {kind: _LINES[kind], **_RUNS.get(kind, {})}):
            raise _damaged(path, f"a {kind or 'line'} that is none")
        rows[kind].append(line[kind])
    if not has_shape(head, _HEAD):
        raise _damaged(path, "a first line that describes no study")
    try:
        students = [Student.from_json(row) for row in rows["student"]]
        return Records(
            study=head["study"],
            about=head["about"],
            table=Table(
                students=students,
                digests=[tuple(line["runs"]) for line in lines if "student" in line],
                scores=[AuditScore(**row) for row in rows["score"]],
                teachers=[AuditScore(**row) for row in rows["teachers"]],
                development=[AuditScore(**row) for row in rows["development"]],
                validity={int(k): Validity.from_json(v) for k, v in head["validity"].items()},
                contexts=[ContextRow(**row) for row in rows["context"]],
                notes=[NoteRow(**row) for row in rows["note"]],
                left_out=head["left_out"],
                refused={int(seed): reasons for seed, reasons in head["refused"].items()},
                runs=head["runs"],
                planned=head.get("planned", len({s.base_seed for s in students})),
            ),
        )
    except (ValueError, TypeError) as error:  # values out of range, or other names
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{printable(path)}: expected the records of a study, got a damaged file "
        f"({printable(reason)}); copy it again, or run the study again"
    )


def means_of(student: Student) -> Student:
    """Return a pair of students whose readings are means instead of items."""
    means: dict[str, Any] = {
        name: _mean(v) for name, v in vars(student).items() if isinstance(v, Reading)
    }
    curve = tuple(
        replace(point, untrusted=_mean(point.untrusted), benign=_mean(point.benign))
        for point in student.curve
    )
    return replace(student, **means, curve=curve)


def _mean(reading: Reading) -> Reading:
    return Reading(**{n: (math.fsum(v) / len(v),) if v else () for n, v in vars(reading).items()})


def numbers(notes: Any, path: str = "") -> list[tuple[str, float]]:
    """Return the numbers of nested notes with their paths; lists and strings are left out."""
    if isinstance(notes, bool | int | float):
        return [(path, float(notes))]
    if isinstance(notes, Mapping):
        return [
            pair
            for key, value in notes.items()
            for pair in numbers(value, f"{path}, {key}" if path else str(key))
        ]
    return []
