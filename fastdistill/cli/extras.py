"""Which extra of the package each command needs."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

from ..runtime.optional import needs

EXTRA_OF = {
    "audit": "audit",
    "demo": "demo",
    "experiment": "audit",
    "organisms": "audit,peft",
    "report": "report",
    "serve": "serve",
    "train": "train,report",
}


def command_needs() -> AbstractContextManager[None]:
    """Context that raises MissingExtra with the extra of the command in sys.argv."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return needs(f"fastdistill {command}".rstrip(), EXTRA_OF.get(command, "train"))
