"""What may be asked of our server: read from JSON, and refused in OpenAI's form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn


class Refused(Exception):
    """An answer other than 200: its status, what to say, and which field is meant."""

    def __init__(
        self, status: int, message: str, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.retry_after = status, field, retry_after

    def as_json(self) -> dict[str, Any]:
        kinds = {401: "Unauthorized", 404: "NotFoundError", 503: "ServiceUnavailable"}
        kind = kinds.get(self.status, "BadRequestError" if self.status < 500 else "ServerError")
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.status}
        return {"error": error}


@dataclass(frozen=True, kw_only=True)
class Limits:
    name: str  # of the model
    vocab: int
    max_k: int
    max_tokens: int  # in all rows of a request


class Question(NamedTuple):
    """`own_tokens`: also what the teacher says of each row's own next tokens."""

    rows: list[list[int]]
    k: int
    temperature: float
    own_tokens: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


def packed_question(said: dict[str, Any], limits: Limits) -> Question:
    _model(said, limits)
    k = _k(said, "k", limits)
    return Question(_rows(said, limits), k, _temperature(said), False)


def completion_question(said: dict[str, Any], limits: Limits) -> Question:
    """With prompt_logprobs, or without: then one likeliest token is all that is asked for."""
    _model(said, limits)
    for field, only in (("stream", False), ("echo", False), ("n", 1), ("logprobs", None)):
        if said.get(field) not in (None, only):
            _bad(field, f"{only!r}: this is a teacher, not a chat server", said[field])
    most = said.get("max_tokens", 1)
    if type(most) is not int or most not in (0, 1):
        _bad("max_tokens", "0 or 1: this is a teacher, not a chat server", most)
    asked = said.get("prompt_logprobs") is not None
    k = _k(said, "prompt_logprobs", limits) if asked else 1
    return Question(_rows(said, limits), k, _temperature(said), asked)


def _model(said: dict[str, Any], limits: Limits) -> None:
    if said.get("model") not in (None, limits.name):
        message = f"model: expected {limits.name!r}, which is served here, got {said['model']!r}"
        raise Refused(404, message, "model")


def _k(said: dict[str, Any], field: str, limits: Limits) -> int:
    k = said.get(field)
    most = min(limits.max_k, limits.vocab)
    if type(k) is not int or not 1 <= k <= most:
        _bad(field, f"an integer in 1..{most} (max_k of this server)", k)
    return k


def _temperature(said: dict[str, Any]) -> float:
    T = said.get("temperature")
    T = 1.0 if T is None else T
    if type(T) not in (int, float) or not (math.isfinite(T) and T > 0):
        _bad("temperature", "a finite number above 0, the T of softmax(logits / T)", T)
    return float(T)


def _rows(said: dict[str, Any], limits: Limits) -> list[list[int]]:
    prompt = said.get("prompt")
    rows = prompt if isinstance(prompt, list) and prompt else None
    if rows is not None and not any(isinstance(row, list) for row in rows):
        rows = [rows]  # one prompt
    if rows is None or not all(isinstance(row, list) and row for row in rows):
        _bad("prompt", "lists of token ids, none of them empty", str(prompt)[:60])
    total = sum(map(len, rows))
    if total > limits.max_tokens:
        _bad("prompt", f"at most {limits.max_tokens} tokens (max_tokens of this server)", total)
    for row in rows:
        for token in row:
            if type(token) is not int or not 0 <= token < limits.vocab:
                _bad("prompt", f"token ids in 0..{limits.vocab - 1}", repr(token)[:60])
    return rows


def _bad(field: str, expected: str, got: Any) -> NoReturn:
    raise Refused(400, f"{field}: expected {expected}, got {got}", field)
