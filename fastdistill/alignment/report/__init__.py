"""What students took over from their teachers: scores of audits, and the page of a study.

Each name is loaded when it is first used, because pages need matplotlib.
"""

from typing import TYPE_CHECKING

from ...runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .audit_scores import AuditScore
    from .transfer import TransferReport

__all__ = ["AuditScore", "TransferReport"]

_MODULE_OF = {"AuditScore": "audit_scores", "TransferReport": "transfer"}

__getattr__ = lazy_names(__name__, _MODULE_OF, extra="audit")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
