"""HTML reports (`Report`), and the report of a transfer experiment (`TransferReport`).

`Report` is imported eagerly; classes that need statistics and figures on first use.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names
from .html import Report

if TYPE_CHECKING:
    from .incrimination import AuditScore
    from .transfer import TransferReport

__all__ = ["AuditScore", "Report", "TransferReport"]

_MODULE_OF = {"AuditScore": "incrimination", "TransferReport": "transfer"}

__getattr__ = lazy_names(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
