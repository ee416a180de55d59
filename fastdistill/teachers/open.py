"""Which teacher a path or URL means: a server, a cache, or a model to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hf.source import source_of
from .cache import TeacherCache
from .http import ServedTeacher


def open_teacher(teacher: Any) -> Any:
    """Return the server behind a URL or the cache in a folder; return anything else unchanged.

    Paths and hub names of models stay as they are: `load_teacher` of local.py loads them.
    """
    if not isinstance(teacher, (str, Path)):
        return teacher
    source = source_of("teacher", teacher)
    if source.kind == "server":
        return ServedTeacher(source.name)
    return TeacherCache(source.path) if source.kind == "cache" else teacher
