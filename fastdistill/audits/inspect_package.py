"""Import of the optional package Inspect AI, with installation advice where it is missing."""

from __future__ import annotations

try:
    import inspect_ai
    import inspect_ai.dataset
    import inspect_ai.log
    import inspect_ai.model
    import inspect_ai.scorer
    import inspect_ai.solver
    import inspect_ai.util
except ModuleNotFoundError as error:
    if error.name != "inspect_ai":
        raise
    raise ImportError(
        "inspect_ai: expected Inspect AI to be installed (pip install 'fastdistill[inspect]', "
        "Python 3.11 or newer)"
    ) from None

__all__ = ["inspect_ai"]
