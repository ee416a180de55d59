"""HTML reports (`Report`), and the report of a transfer experiment (`TransferReport`).

`Report` is imported eagerly; classes that need statistics and figures on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .page import Report

if TYPE_CHECKING:
    from .incrimination import AuditScore
    from .transfer import TransferReport

__all__ = ["AuditScore", "Report", "TransferReport"]

_MODULE_OF = {"AuditScore": "incrimination", "TransferReport": "transfer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
