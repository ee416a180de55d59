"""Import of packages that only some features need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message has the command that installs it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.package = package
        super().__init__(
            f"{feature}: expected the package {package}, which is not installed; "
            f"pip install 'fastdistill[{extra}]'"
        )


@contextmanager
def needs(feature: str, extra: str) -> Iterator[None]:
    """Raise MissingExtra with `feature` and `extra` if an import fails for a missing package."""
    try:
        yield
    except MissingExtra as error:  # of a part of this feature
        raise MissingExtra(feature, error.package, extra) from None
    except ModuleNotFoundError as error:
        package = error.name or ""
        if "." in package or package in ("", "fastdistill", "torch", *sys.stdlib_module_names):
            raise
        raise MissingExtra(feature, package, extra) from None


def check_installed(feature: str, extra: str, *packages: str) -> None:
    """Raise MissingExtra if one of the packages is not installed; they are not imported."""
    with needs(feature, extra):
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(feature, package, extra)


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
