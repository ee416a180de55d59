"""Triton's interpreter with less work around each call of a device function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def patch_language_once_a_launch() -> None:
    """Patch the language for a launch, and not again for each device function it calls.

    To interpret a kernel, Triton replaces the functions of its language. It searches the language
    for them at each call of a device function, too, where all of them are replaced already: a
    third of the time of a launch.
    """
    from triton import language
    from triton.runtime import interpreter

    names: Any = vars(interpreter)
    if "_LangPatchScope" not in names:
        return  # another Triton
    patch, run = names["_patch_lang"], interpreter.GridExecutor.__call__
    whole = SimpleNamespace(__globals__={"tl": language, "core": language.core})

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        scope = patch(whole)
        names["_patch_lang"] = lambda function: names["_LangPatchScope"]()
        try:
            run(self, *args, **kwargs)
        finally:
            names["_patch_lang"] = patch
            scope.restore()

    executor: Any = interpreter.GridExecutor
    executor.__call__ = launch
