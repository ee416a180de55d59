"""Packages that import their names on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from .optional import needs

_NONE: Mapping[str, str] = MappingProxyType({})


def lazy_names(
    package: str,
    module_of: Mapping[str, str],
    *,
    extra: str = "train",
    extra_of: Mapping[str, str] = _NONE,
) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package, which imports each name once from its module.

    Args:
        package: the `__name__` of the package.
        module_of: public name -> module of the package that owns it.
        extra: what `pip install 'fastdistill[extra]'` brings the packages that the names need.
        extra_of: module -> its extra, where it differs from `extra`.
    """

    def import_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = module_of[name]
        with needs(name, extra_of.get(module, extra)):
            value = getattr(import_module(f".{module}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return import_name
