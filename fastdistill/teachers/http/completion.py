"""Writes the JSON responses of /v1/completions in vLLM's form."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from .requests import Completion
from .wire_format import entries
from .worker import RowAnswer

_Entries = list[dict[str, Any] | None]


class Words:
    """Decodes tokens, each once; None if the server has no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[..., str] | None = getattr(tokenizer, "decode", None)
        self._words: dict[int, str | None] = {}

    def __call__(self, token: int) -> str | None:
        if token not in self._words:
            self._words[token] = None if self._decode is None else self._decode([token])
        return self._words[token]

    def text(self, tokens: list[int]) -> str:
        return "" if self._decode is None or not tokens else self._decode(tokens)


def completion_json(
    completion: Completion, answers: list[RowAnswer], *, name: str, tokenizer: Any
) -> bytes:
    """Return the JSON response to a completion request, one choice per row."""
    words = Words(tokenizer)
    choices = [
        _choice(completion, index, row, answer, words)
        for index, (row, answer) in enumerate(zip(completion.question.rows, answers, strict=True))
    ]
    generated = completion.max_tokens * len(choices)
    usage = {
        "prompt_tokens": completion.question.tokens,
        "completion_tokens": generated,
        "total_tokens": completion.question.tokens + generated,
    }
    body = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
        "choices": choices,
        "usage": usage,
    }
    return json.dumps(body, allow_nan=False).encode()


def _choice(
    completion: Completion, index: int, row: list[int], answer: RowAnswer, words: Words
) -> dict[str, Any]:
    best, logprobs, ranks = answer
    generated = [int(best.ids[-1, best.logprobs[-1].argmax()])] * completion.max_tokens
    tokens = [*row, *generated] if completion.echo else generated

    def prompt(count: int) -> _Entries:
        return entries(best, row, logprobs, ranks, words, count)

    listed: _Entries | None = None
    if (count := completion.logprobs) is not None:
        listed = prompt(count) if completion.echo else []
        if generated:
            # The last position has the logprobs of the new token.
            last = best.at(slice(-1, None))
            listed += entries(last, [row[-1], *generated], [0.0], [0], words, count)[1:]
    count = completion.prompt_logprobs
    return {
        "index": index,
        "text": words.text(tokens),
        "logprobs": None if listed is None else _logprobs(tokens, listed, words),
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": None if count is None else prompt(count),
    }


def _logprobs(tokens: list[int], listed: _Entries, words: Words) -> dict[str, Any]:
    """Return OpenAI's form of the entries of these tokens."""
    texts = [words(token) for token in tokens]
    names = [f"token_id:{t}" if x is None else x for t, x in zip(tokens, texts, strict=True)]
    return {
        "text_offset": [0, *accumulate(map(len, names))][: len(names)],
        "token_logprobs": [
            None if entry is None else entry[str(token)]["logprob"]
            for token, entry in zip(tokens, listed, strict=True)
        ],
        "tokens": names,
        "top_logprobs": [None if entry is None else _by_text(entry) for entry in listed],
    }


def _by_text(entry: dict[str, Any]) -> dict[str, float]:
    """Return log-probabilities by text; the likeliest of tokens with the same text."""
    by_text: dict[str, float] = {}
    for token, info in entry.items():
        text = info["decoded_token"]
        name = f"token_id:{token}" if text is None else text
        by_text[name] = max(info["logprob"], by_text.get(name, info["logprob"]))
    return by_text
