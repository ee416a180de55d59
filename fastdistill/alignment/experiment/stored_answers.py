"""A teacher's answers and their top k in files, so that arms with the same prompts share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from ...hf.source import MANIFEST
from ...teachers.cache import TeacherCache
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .digest import digest_of, read_record, write_record


@dataclass(frozen=True, kw_only=True)
class StoredAnswers:
    """`teacher.generate`, which reads the answers from the folder where it stored them before."""

    teacher: Subject
    folder: Path

    def __call__(self, prompts: Sequence[Prompt], **generation: Any) -> list[str]:
        key = digest_of({"prompts": [prompt.as_json() for prompt in prompts], **generation})
        path = self.folder / f"{key[:20]}.json"
        if not path.is_file():
            write_record(path, {"answers": self.teacher.generate(prompts, **generation)})
        answers: list[str] = read_record(path, "answers")["answers"]
        return answers


@dataclass(frozen=True, kw_only=True)
class StoredTopK:
    """A teacher's top 64 on the rows of its answers, computed once.

    Arms with k ≤ 64 and these temperatures share it, and filters, whose rows are among these.
    """

    folder: Path

    k: ClassVar[int] = 64
    temperatures: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0)

    def __call__(self, teacher: Any, rows: Sequence[Mapping[str, list[int]]]) -> TeacherCache:
        """Return the cache of the folder for these rows; another process may be building it."""
        path = self.folder / digest_of(list(rows))[:20]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (path / MANIFEST).is_file():  # complete
                return TeacherCache(path)
            return TeacherCache.build(
                teacher,
                list(rows),
                path,
                k=self.k,
                temperatures=self.temperatures,
                positions="targets",
            )
