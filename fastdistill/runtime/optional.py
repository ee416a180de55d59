"""Import of packages that only some features need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, name: str, install: str | None = None) -> Any:
    """Return an optional module, or raise ImportError with the command that installs it.

    Args:
        module: name to import, as "pyarrow.parquet".
        name: the argument or function of ours that needs it; the error starts with it.
        install: what `pip install` brings it; None: the module's package.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{name}: expected the package {package}, which is not installed; "
            f"pip install {install or package}"
        ) from None
