"""The JSON of an answer of /v1/completions, as vLLM writes it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

from .requests import Completion
from .wire import entries
from .worker import Answered

_Entries = list[dict[str, Any] | None]


class Words:
    """The text of tokens, each decoded once; None where the server has no tokenizer."""

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
    asked: Completion, answers: list[Answered], *, name: str, tokenizer: Any
) -> bytes:
    """Return the answer to a completion's question, one choice for each of its rows."""
    words = Words(tokenizer)
    choices = [
        _choice(asked, index, row, answer, words)
        for index, (row, answer) in enumerate(zip(asked.question.rows, answers, strict=True))
    ]
    made = asked.max_tokens * len(choices)
    usage = {"prompt_tokens": asked.question.tokens, "completion_tokens": made,
             "total_tokens": asked.question.tokens + made}  # fmt: skip
    said = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion",
            "created": int(time.time()), "model": name, "choices": choices,
            "usage": usage}  # fmt: skip
    return json.dumps(said, allow_nan=False).encode()


def _choice(
    asked: Completion, index: int, row: list[int], answer: Answered, words: Words
) -> dict[str, Any]:
    best, logprobs, ranks = answer
    made = [int(best.ids[-1, best.logprobs[-1].argmax()])] * asked.max_tokens

    def listed(count: int) -> _Entries:
        return entries(best, row, logprobs, ranks, words, count)

    return {
        "index": index,
        "text": words.text([*row, *made] if asked.echo else made),
        "logprobs": None if asked.logprobs is None else _logprobs(
            asked, row, made, answer, words, listed(asked.logprobs) if asked.echo else []),
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": None if asked.prompt_logprobs is None else listed(asked.prompt_logprobs),
    }  # fmt: skip


def _logprobs(
    asked: Completion,
    row: list[int],
    made: list[int],
    answer: Answered,
    words: Words,
    prompt: _Entries,
) -> dict[str, Any]:
    """OpenAI's form: parallel lists over the prompt, where it is echoed, and the new token."""
    tokens = [*row, *made] if asked.echo else made
    listed = list(prompt)
    if made:
        # The new token is one more of the row: what is said of it stands at the last position.
        last = answer.best
        ended = type(last)(last.ids[-1:], last.logprobs[-1:], None, last.temperature)
        listed += entries(ended, [row[-1], *made], [0.0], [0], words, asked.logprobs or 0)[1:]
    texts = [words(token) for token in tokens]
    names = [f"token_id:{t}" if x is None else x for t, x in zip(tokens, texts, strict=True)]
    offsets, at = [], 0
    for name in names:
        offsets.append(at)
        at += len(name)
    return {
        "text_offset": offsets,
        "token_logprobs": [
            None if entry is None else entry[str(token)]["logprob"]
            for token, entry in zip(tokens, listed, strict=True)
        ],
        "tokens": names,
        "top_logprobs": [None if entry is None else _by_text(entry) for entry in listed],
    }


def _by_text(entry: dict[str, Any]) -> dict[str, float]:
    """Log-probabilities by text; of tokens with the same text the likeliest counts."""
    found: dict[str, float] = {}
    for token, said in entry.items():
        text = said["decoded_token"]
        name = f"token_id:{token}" if text is None else text
        found[name] = max(said["logprob"], found.get(name, said["logprob"]))
    return found
