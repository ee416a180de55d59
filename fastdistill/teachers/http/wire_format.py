"""The two formats of answers; N is the number of tokens of a request's rows.

JSON     POST /v1/completions, as in vLLM: choices[i].prompt_logprobs[t + 1] is
         {"<id>": {"logprob", "rank", "decoded_token"}, …}, the k likeliest tokens after token t,
         and token t + 1 if it is none of them; entry 0 is null, and −inf is written as −9999.
packed   POST /v1/topk {"model", "prompt": [[id, …], …], "k", "temperature"}: safetensors with ids
         int32 [N, k], logprobs [N, k] and log_tail [N] in the teacher's fp32 or fp64. It has a
         ninth of the JSON's size, is exact, and includes the tail. With "ids" [[[id, …], …], …]
         instead of "k", the answers are about these ids, of each token of each row: −1 is an empty
         slot, and repeats become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ...losses.types import TopK
from ...runtime.json_text import JSONError, RepeatedName, parse_json
from ...runtime.printable import printable
from .response_checks import WrongAnswer

_NEVER = -9999.0  # −inf in JSON
_FLOOR = 2.0**-24
_IDS = 1 << 31


class NoPromptLogprobs(ValueError):
    """The server's answer has no log-probabilities of the prompt."""


def pack(answer: TopK) -> bytes:  # [N, K]
    assert answer.log_tail is not None
    return save(
        {
            "ids": answer.ids.int().contiguous(),
            "logprobs": answer.logprobs.contiguous(),
            "log_tail": answer.log_tail.contiguous(),
        }
    )


def unpack(body: bytes, temperature: float, url: str) -> TopK:  # [N, K]
    try:
        tensors = load(body)
        ids, logprobs, tail = (tensors[name] for name in ("ids", "logprobs", "log_tail"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise WrongAnswer(
            f"{url}: expected ids, logprobs and log_tail, got {printable(error)}"
        ) from None
    floats = (torch.float32, torch.float64)
    if ids.dtype != torch.int32 or logprobs.dtype not in floats or tail.dtype not in floats:
        raise WrongAnswer(f"{url}: expected int32 and floats, got {ids.dtype}, {logprobs.dtype}")
    if ids.dim() != 2 or tail.shape != ids.shape[:1]:
        raise WrongAnswer(f"{url}: expected ids [N, k], got {list(ids.shape)}, {list(tail.shape)}")
    return TopK(ids.long(), logprobs, tail, temperature)


def entries(
    row: TopK,  # [T, K]
    tokens: Sequence[int],  # T of them
    logprobs: Sequence[float],  # T − 1: of tokens[1:], for those not among the K
    ranks: Sequence[int],
    word: Callable[[int], str | None],
    count: int,
) -> list[dict[str, Any] | None]:
    """Return prompt_logprobs of one prompt: the `count` ≤ K likeliest and the prompt's tokens."""
    listed: list[dict[str, Any] | None] = [None]
    ids, values = row.ids.tolist(), row.logprobs.tolist()
    for t, token in enumerate(tokens[1:]):
        slots = {i: (p, rank) for rank, (i, p) in enumerate(zip(ids[t], values[t], strict=True), 1)}
        own_entry = slots.get(token, (logprobs[t], ranks[t]))
        entry = {str(i): _entry(*slots[i], word(i)) for i in ids[t][:count]}
        if str(token) not in entry:
            entry = {str(token): _entry(*own_entry, word(token)), **entry}
        listed.append(entry)
    return listed


def _entry(logprob: float, rank: int, word: str | None) -> dict[str, Any]:
    return {"logprob": max(logprob, _NEVER), "rank": rank, "decoded_token": word}


def read_choices(
    body: bytes, prompts: Sequence[Sequence[int]], k: int, temperature: float, url: str
) -> TopK:
    """Return answers [N, K] from JSON, for these prompts without their last tokens.

    The tail is 1 − Σ p, at least 2⁻²⁴."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    try:
        choices = parse_json(body, url, dict, unique=True)["choices"]
        by_index = {choice["index"]: choice.get("prompt_logprobs") for choice in choices}
    except RepeatedName as error:
        raise WrongAnswer(str(error)) from None
    except (JSONError, KeyError, TypeError, AttributeError):
        raise WrongAnswer(f"{url}: expected JSON with choices, got {body[:80]!r}") from None
    if len(choices) != len(lengths) or by_index.keys() != set(range(len(lengths))):
        raise WrongAnswer(
            f"{url}: expected {len(lengths)} choices, one for each prompt, got {len(choices)} with "
            f"the indices {printable(sorted(map(str, by_index))[:8])}"
        )
    best = [
        _top_k(entry, prompts[row][t + 1], k, f"{url}: row {row}, position {t}")
        for row, length in enumerate(lengths)
        for t, entry in enumerate(_positions(by_index[row], length, row, url))
    ]
    ids = torch.tensor([[i for i, _ in slots] for slots in best], dtype=torch.int64).view(-1, k)
    values = [[p for _, p in slots] for slots in best]
    exact = torch.tensor(values, dtype=torch.float64).view(-1, k)
    tail = (1 - exact.exp().sum(-1)).clamp(min=_FLOOR).log()
    return TopK(ids, exact.float(), tail.float(), temperature)


def _positions(listed: Any, length: int, row: int, url: str) -> list[Any]:
    if listed is None:
        raise NoPromptLogprobs(f"row {row}: expected prompt_logprobs, got NoneType")
    if not isinstance(listed, list):
        raise WrongAnswer(
            f"{url}: row {row}: expected a list of prompt_logprobs, one entry for each token of "
            f"the prompt, got {type(listed).__name__}. This is another protocol than vLLM's"
        )
    if len(listed) != length + 1:
        raise WrongAnswer(
            f"{url}: row {row}: expected prompt_logprobs with {length + 1} entries, one for each "
            f"token of the prompt, got {len(listed)}. Older releases of vLLM leave out what is in "
            "their prefix cache: start it with --no-enable-prefix-caching"
        )
    return listed[1:]


def _top_k(entry: Any, own: int, k: int, where: str) -> list[tuple[int, float]]:
    """Return the k likeliest (id, logprob) of an entry, which must include the token `own`."""
    try:
        slots = [(int(i), float(info["logprob"]), info.get("rank")) for i, info in entry.items()]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        got = printable(entry, 80)
        raise WrongAnswer(f"{where}: expected ids with logprobs, got {got}") from None
    if any(math.isnan(p) for _, p, _ in slots):
        raise WrongAnswer(f"{where}: expected numbers for log-probabilities, got NaN")
    for i, _, _ in slots:
        if not 0 <= i < _IDS:
            raise WrongAnswer(f"{where}: expected ids in 0..{_IDS - 1}, got {printable(i, 40)}")
    if len(slots) not in (k, k + 1):
        raise WrongAnswer(f"{where}: expected {k} or {k + 1} entries, got {len(slots)}")
    if own not in {i for i, _, _ in slots}:
        raise WrongAnswer(
            f"{where}: expected the prompt's own next token {own} among the entries, as vLLM has "
            f"it, got {sorted(i for i, _, _ in slots)[:8]}. These are answers for another "
            "position or row"
        )
    slots.sort(key=lambda slot: (-slot[1], slot[2] if isinstance(slot[2], int) else math.inf))
    return [(i, -math.inf if p <= _NEVER else p) for i, p, _ in slots[:k]]
