"""The answers of a teacher in files, so that arms with the same prompts share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
