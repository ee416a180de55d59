"""What an on-policy sampler gets and returns, for samplers outside of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..runtime import checks


class SampleRequest(NamedTuple):
    """The completions that a step needs.

    prompts: token ids of each row. seeds: one per row, in 0 .. 2³¹ − 1, from seed, step and prompt.
    ends: ids that end a completion. vocab: ids are below it. model: the student. step: of the run.
    """

    prompts: list[list[int]]
    seeds: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    ends: list[int]
    vocab: int
    model: Any
    step: int


# The new tokens of each row, up to max_new_tokens.
Sampler: TypeAlias = Callable[[SampleRequest], Sequence[Sequence[int]]]


def sampled_by(sampler: Sampler, request: SampleRequest) -> list[list[int]]:
    """Return a sampler's completions, each up to its first end token.

    Raises:
        ValueError: not one list of ids of the vocabulary for each prompt, or a longer one.
    """
    completions = sampler(request)
    rows = len(request.prompts)
    if not isinstance(completions, Sequence) or len(completions) != rows:
        got = len(completions) if isinstance(completions, Sequence) else type(completions).__name__
        checks.fail("sampler", f"a list of {rows} completions, one for each prompt", got)
    return [_checked(index, tokens, request) for index, tokens in enumerate(completions)]


def _checked(index: int, tokens: Any, request: SampleRequest) -> list[int]:
    where = f"completion {index}"
    if not isinstance(tokens, Sequence) or len(tokens) > request.max_new_tokens:
        expected = f"at most {request.max_new_tokens} token ids in {where}"
        got = len(tokens) if isinstance(tokens, Sequence) else type(tokens).__name__
        checks.fail("sampler", expected, got)
    for token in tokens:
        if type(token) is not int or not 0 <= token < request.vocab:
            checks.fail("sampler", f"ids in 0..{request.vocab - 1} in {where}", repr(token))
    ids = list(tokens)
    ends = [i for i, token in enumerate(ids) if token in request.ends]
    return ids[: ends[0] + 1] if ends else ids
