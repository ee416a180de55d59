"""The description that fastdistill serve adds to its list of models."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from ...runtime.printable import printable
from .response_checks import WrongAnswer

PROTOCOL = 1
_COUNTS = 1 << 31  # upper bound of all counts
TEACHER = "x-fastdistill-teacher"  # header of every packed answer: the teacher's digest


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """`identity`: see teachers/identity.py; max_tokens is the limit of one request."""

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
        """A short digest of the teacher's identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, entries: Any, url: str) -> ServerInfo:
        """Parse a server's description; raise WrongAnswer if it is invalid."""
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
                f"{url}: expected the fields of fastdistill serve, got {printable(error)}"
            ) from None
        counts = (info.vocab_size, info.max_k, info.max_tokens)
        is_valid = all(type(n) is int and 0 < n < _COUNTS for n in counts)
        is_valid &= isinstance(info.identity, dict) and type(info.honours_temperature) is bool
        is_valid &= type(info.tokenizer_sha256) in (str, type(None))
        try:
            json.dumps(info.identity, allow_nan=False)  # a cache stores it as JSON
        except (ValueError, RecursionError):
            is_valid = False
        if not is_valid:
            raise WrongAnswer(
                f"{url}: expected counts above 0 and an identity, got {printable(entries, 200)}"
            )
        return info
