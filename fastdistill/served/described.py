"""What our server says of itself beside the list of models, and the client goes by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from ..runtime.printable import printable
from .verdict import WrongAnswer

PROTOCOL = 1
_COUNTS = 1 << 31  # more than there are of anything
TEACHER = "x-fastdistill-teacher"  # a header of every packed answer: whose it is


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """`identity` is that of the teacher (identity.py); the longest request has max_tokens."""

    protocol: int = PROTOCOL
    version: str
    honours_temperature: bool
    vocab_size: int
    max_k: int
    max_tokens: int
    tokenizer_sha256: str | None
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        """Tells one teacher from another."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, entries: Any, url: str) -> ServerInfo:
        """Raises WrongAnswer for another protocol, or what cannot be."""
        if not isinstance(entries, dict) or entries.get("protocol") != PROTOCOL:
            got = printable(entries.get("protocol") if isinstance(entries, dict) else entries, 80)
            raise WrongAnswer(
                f"{url}: expected protocol {PROTOCOL} of fastdistill serve, got {got}. Use one "
                "release of fastdistill on both machines"
            )
        try:
            info = cls(**entries)
        except TypeError as error:
            raise WrongAnswer(
                f"{url}: expected what fastdistill serve says, got {printable(error)}"
            ) from None
        counts = (info.vocab_size, info.max_k, info.max_tokens)
        is_valid = all(type(n) is int and 0 < n < _COUNTS for n in counts)
        is_valid &= isinstance(info.identity, dict) and type(info.honours_temperature) is bool
        is_valid &= type(info.tokenizer_sha256) in (str, type(None))
        try:
            json.dumps(info.identity, allow_nan=False)  # as a cache will keep it
        except (ValueError, RecursionError):
            is_valid = False
        if not is_valid:
            raise WrongAnswer(
                f"{url}: expected counts above 0 and an identity, got {printable(entries, 200)}"
            )
        return info
