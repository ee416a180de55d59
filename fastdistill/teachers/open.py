"""Which teacher a path or URL means: a server, a cache, or a model to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hf.source import source_of
from ..runtime import checks
from ..runtime.printable import printable
from .cache import TeacherCache
from .http import ServedTeacher


def open_teacher(teacher: Any, role: str = "teacher", **options: Any) -> Any:
    """Return the server behind a URL or the cache in a folder; return anything else unchanged.

    Paths and hub names of models stay as they are: `load_teacher` of local.py loads them.

    Args:
        role: the argument that errors name.
        options: of load_teacher; they are for models.

    Raises:
        ValueError: a cache or server with an option that is neither None nor "auto".
    """
    if not isinstance(teacher, (str, Path)):
        return teacher
    source = source_of(role, teacher)
    if source.kind not in ("server", "cache"):
        return teacher
    for name, value in options.items():
        if value not in (None, "auto"):
            what = "a server" if source.kind == "server" else "a cache"
            expected = f"none with {printable(source.name)}, which is {what} and no model"
            checks.fail(name, expected, repr(value), "leave it out, or pass the model")
    return ServedTeacher(source.name) if source.kind == "server" else TeacherCache(source.path)
