"""Parses requests to the server, and builds errors in OpenAI's form.

Every field is used or raises an error that names it, unless it has its neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ...runtime.printable import printable

MAX_SCORED_IDS = 1 << 21  # in one request: about 16 MB of text
MAX_ENTRIES = 1 << 18  # log-probabilities in one JSON answer: about 20 MB of text
_TEMPERATURES = 2.0**-126, 3e38  # the range of normal fp32 numbers
_TEXT = ". Encode text with the teacher's tokenizer (lm-eval: tokenized_requests=True)"
_COMMON = frozenset(("model", "prompt", "temperature"))
_TOPK = _COMMON | {"k", "ids"}
_COMPLETION = _COMMON | {"max_tokens", "prompt_logprobs", "logprobs", "echo", "seed", "user"}
# Values that do not change an answer of at most one token, the likeliest.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "n": (1,),
    "best_of": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop": ([],),
    "suffix": ("",),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "add_special_tokens": (False,),
    "skip_special_tokens": (True,),
}


class RequestError(Exception):
    """An error response: its status, its message, and the field that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(printable(message, 600))
        self.status, self.field, self.retry_after = status, field, retry_after
        self.close = close  # whether to close the connection

    def as_json(self) -> dict[str, Any]:
        kinds = {401: "Unauthorized", 404: "NotFoundError", 503: "ServiceUnavailable"}
        kind = kinds.get(self.status, "BadRequestError" if self.status < 500 else "ServerError")
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.status}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"Connection": "close"} if self.close else {})


@dataclass(frozen=True, kw_only=True)
class Limits:
    name: str  # of the model
    vocab: int  # ids that the model reads
    head: int  # ids that it predicts
    max_k: int
    max_tokens: int  # in all rows of a request
    max_row: int | None  # in one row; the model's limit


class Question(NamedTuple):
    """What to answer at every token of some rows.

    own_tokens: whether the log-probabilities of each row's own tokens are needed.
    ids: k next tokens to score at each token, by row; None asks for the k likeliest.
    """

    rows: list[list[int]]
    k: int
    temperature: float
    own_tokens: bool
    ids: list[list[list[int]]] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Questions of one kind can be answered in one batch."""
        return self.k, self.temperature, self.own_tokens, self.ids is None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class Completion(NamedTuple):
    """A question and the form of the response.

    prompt_logprobs, logprobs: number of listed likeliest tokens; None for no list.
    echo: text and logprobs begin with the prompt. max_tokens: 0 or 1 greedy tokens.
    """

    question: Question
    prompt_logprobs: int | None
    logprobs: int | None
    echo: bool
    max_tokens: int


def packed_question(body: dict[str, Any], limits: Limits) -> Question:
    check_model(body.get("model"), limits.name)
    _check_fields(body, _TOPK)
    rows, T = _rows(body, limits), _temperature(body)
    if body.get("ids") is None:
        return Question(rows, _count(body, "k", limits, 1), T, False)
    if body.get("k") is not None:
        _fail("k", "none with ids, which are scored instead of the likeliest", body["k"])
    ids = _scored_ids(body["ids"], rows, limits)
    return Question(rows, len(ids[0][0]), T, False, ids)


def completion_question(body: dict[str, Any], limits: Limits) -> Completion:
    """Parse a request in the form of vLLM (prompt_logprobs) or OpenAI (echo, logprobs).

    As there, temperature 0 means the likeliest token and log-probabilities at T = 1.
    """
    check_model(body.get("model"), limits.name)
    _check_fields(body, _COMPLETION)
    echo = body.get("echo")
    if echo not in (None, False, True) or type(echo) is int:
        _fail("echo", "true or false", echo)
    seed = body.get("seed")
    if seed is not None and type(seed) is not int:
        _fail("seed", "an integer (it has no effect: decoding is greedy)", seed)
    prompt_logprobs, logprobs = (
        None if body.get(field) is None else _count(body, field, limits, least)
        for field, least in (("prompt_logprobs", 1), ("logprobs", 0))
    )
    about_prompt = prompt_logprobs is not None or bool(echo)
    max_tokens = body.get("max_tokens")
    max_tokens = 1 if max_tokens is None and about_prompt else max_tokens
    if type(max_tokens) is not int or max_tokens not in (0, 1):
        got = "none, which means 16 to clients of OpenAI" if max_tokens is None else max_tokens
        _fail("max_tokens", "0 or 1: this is a teacher, not a chat server", got)
    k = max(prompt_logprobs or 1, logprobs or 1)
    own_tokens = prompt_logprobs is not None or (bool(echo) and logprobs is not None)
    T = body.get("temperature")
    temperature = 1.0 if type(T) in (int, float) and T == 0 else _temperature(body)
    question = Question(_rows(body, limits), k, temperature, own_tokens)
    entries = question.tokens * (k + 1)
    if own_tokens and entries > MAX_ENTRIES:
        raise RequestError(
            413,
            f"prompt: expected at most {MAX_ENTRIES} log-probabilities in a JSON answer, got "
            f"{entries} ({question.tokens} tokens × {k + 1}). Send fewer tokens, or ask "
            "/v1/topk, whose answers are packed, as ServedTeacher does",
            "prompt",
        )
    return Completion(question, prompt_logprobs, logprobs, bool(echo), max_tokens)


def _check_fields(body: dict[str, Any], used: frozenset[str]) -> None:
    for field, value in body.items():
        if field in used or value is None:
            continue
        neutral = _NEUTRAL.get(field, ()) if used is _COMPLETION else ()
        if any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in neutral):
            continue
        if neutral:
            expected = " or ".join(map(repr, neutral))
            _fail(printable(field, 60), f"{expected}: this is a teacher, not a chat server", value)
        _fail(printable(field, 60), f"no such field, only {', '.join(sorted(used))}", value)


def check_model(model: Any, name: str) -> None:
    """Raise RequestError if a request is for another model than `name`."""
    if model not in (None, name):
        message = f"model: expected {name!r}, which is served here, got {printable(model, 60)!r}"
        raise RequestError(404, message, "model")


def _count(body: dict[str, Any], field: str, limits: Limits, low: int) -> int:
    k = body.get(field)
    high = min(limits.max_k, limits.vocab)
    if type(k) is not int or not low <= k <= high:
        _fail(field, f"an integer in {low}..{high} (max_k of this server)", k)
    return k


def _temperature(body: dict[str, Any]) -> float:
    T = body.get("temperature")
    T = 1.0 if T is None else T
    low, high = _TEMPERATURES
    if type(T) not in (int, float) or not low <= T <= high:
        expected = "a finite number above 0 that fp32 can hold, the T of softmax(logits / T)"
        _fail("temperature", expected, T)
    return float(T)


def _rows(body: dict[str, Any], limits: Limits) -> list[list[int]]:
    prompt = body.get("prompt")
    rows = prompt if isinstance(prompt, list) and prompt else None
    if rows is not None and not any(isinstance(row, list) for row in rows):
        rows = [rows]  # one prompt
    if rows is None or not all(isinstance(row, list) and row for row in rows):
        _fail("prompt", "lists of token ids, none of them empty", prompt, _TEXT)
    total = sum(map(len, rows))
    if total > limits.max_tokens:
        _fail("prompt", f"at most {limits.max_tokens} tokens (max_tokens of this server)", total)
    for index, row in enumerate(rows):
        if limits.max_row is not None and len(row) > limits.max_row:
            expected = f"rows of at most {limits.max_row} tokens, the positions of this model"
            got = f"{len(row)} in row {index}. Cut rows to max_length={limits.max_row}"
            _fail("prompt", expected, got)
        for token in row:
            if type(token) is not int or not 0 <= token < limits.vocab:
                remedy = _TEXT if isinstance(token, str) else ""
                _fail("prompt", f"token ids in 0..{limits.vocab - 1}", token, remedy)
    return rows


def _scored_ids(ids: Any, rows: list[list[int]], limits: Limits) -> list[list[list[int]]]:
    if not isinstance(ids, list) or len(ids) != len(rows):
        _fail("ids", f"a list of {len(rows)} rows, as prompt has", ids)
    slots = None
    for index, (row, of_row) in enumerate(zip(rows, ids, strict=True)):
        if not isinstance(of_row, list) or len(of_row) != len(row):
            _fail("ids", f"{len(row)} lists of ids in row {index}, one for each token", of_row)
        for position, of_token in enumerate(of_row):
            where = f"row {index}, position {position}"
            if not isinstance(of_token, list) or not of_token:
                _fail("ids", f"a list of at least one id at {where}", of_token)
            slots = len(of_token) if slots is None else slots
            if len(of_token) != slots or slots > limits.head:
                expected = f"equally many ids for every token, at most {limits.head}"
                _fail("ids", expected, f"{len(of_token)} at {where}")
            for token in of_token:
                if type(token) is not int or not -1 <= token < limits.head:
                    expected = f"token ids in 0..{limits.head - 1}, or −1 for an empty slot"
                    _fail("ids", expected, token)
    total = sum(map(len, rows)) * (slots or 0)
    if total > MAX_SCORED_IDS:
        message = f"ids: expected at most {MAX_SCORED_IDS} in a request, got {total}"
        raise RequestError(413, f"{message}. Send fewer rows, or fewer ids for each token", "ids")
    return ids


def _fail(field: str, expected: str, got: Any, remedy: str = "") -> NoReturn:
    message = f"{field}: expected {expected}, got {printable(got, 120)}{remedy}"
    raise RequestError(400, message, field)
