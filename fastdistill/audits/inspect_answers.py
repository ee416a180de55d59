"""What a batch of requests is answered: new tokens, and log-probabilities of tokens that are there.

    log p(token) = z_token − lse        by linear_lse_gather, the likeliest by linear_topk

No [tokens, vocabulary] logits but those of the one token that is chosen next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..outputs import TopK
from ..primitive import linear_topk
from .inspect_messages import EncodedInput
from .inspect_package import inspect_ai
from .subject import GENERATION_BATCH, Subject


@dataclass(eq=False)
class InspectRequest:
    """A request on its way."""

    reading: EncodedInput
    config: Any  # GenerateConfig
    stream: int  # of random numbers
    wake: Any  # anyio.Event: answered, or first of those that still wait
    outcome: Any = None  # ModelOutput or Exception


def outputs(subject: Subject, batch: list[InspectRequest]) -> list[Any]:
    """A ModelOutput per request."""
    new = _generated(subject, batch)
    texts = [subject.text(ids) for ids in new]
    before, behind = _before(subject, batch), _behind(subject, batch, new)
    told = []
    for i, asked in enumerate(batch):
        message = inspect_ai.model.ChatMessageAssistant(
            content=texts[i], model=subject.name, source="generate"
        )
        choice = inspect_ai.model.ChatCompletionChoice(
            message=message,
            stop_reason=_stop_reason(subject, new[i], asked),
            logprobs=behind.get(i),
            prompt_logprobs=before.get(i),
        )
        read_, said = len(asked.reading.ids), len(new[i])
        usage = inspect_ai.model.ModelUsage(
            input_tokens=read_, output_tokens=said, total_tokens=read_ + said
        )
        told.append(inspect_ai.model.ModelOutput(model=subject.name, choices=[choice], usage=usage))
    return told


def _stop_reason(subject: Subject, new: list[int], asked: InspectRequest) -> str:
    if subject.is_ended(new) or not new:  # nothing is generated where a completion is scored
        return "stop"
    return "max_tokens" if len(new) >= asked.config.max_tokens else "model_length"


def _generated(subject: Subject, batch: list[InspectRequest]) -> list[list[int]]:
    """New tokens: requests of one kind together; a completion is scored, not gone on from."""
    new: list[list[int]] = [[] for _ in batch]
    kinds: dict[tuple[int, float, int], list[int]] = {}
    for i, asked in enumerate(batch):
        config = asked.config
        if asked.reading.begin is None and config.max_tokens:
            kind = (config.max_tokens, config.temperature or 0.0, config.seed or 0)
            kinds.setdefault(kind, []).append(i)
    for (tokens, temperature, seed), which in kinds.items():
        for start in range(0, len(which), GENERATION_BATCH):
            some = which[start : start + GENERATION_BATCH]
            found = subject.generate_ids(
                [batch[i].reading.ids for i in some],
                max_new_tokens=tokens,
                temperature=temperature,
                seed=seed,
                streams=[batch[i].stream for i in some],
            )
            for i, ids in zip(some, found, strict=True):
                new[i] = ids
    return new


def _before(subject: Subject, batch: list[InspectRequest]) -> dict[int, Any]:
    """Log-probabilities of the prompts' tokens, or of the completions' alone."""
    which = [i for i, a in enumerate(batch) if a.config.prompt_logprobs]
    asked = [batch[i] for i in which]
    found = _log_probs(
        subject,
        [a.reading.ids for a in asked],
        [a.reading.begin or 0 for a in asked],
        [a.config.prompt_logprobs if a.config.prompt_logprobs > 1 else 0 for a in asked],
    )
    return dict(zip(which, found, strict=True))


def _behind(subject: Subject, batch: list[InspectRequest], new: list[list[int]]) -> dict[int, Any]:
    """Log-probabilities of the generated tokens, at temperature 1."""
    which = [i for i, a in enumerate(batch) if a.config.logprobs or a.config.top_logprobs]
    found = _log_probs(
        subject,
        [batch[i].reading.ids + new[i] for i in which],
        [len(batch[i].reading.ids) for i in which],
        [batch[i].config.top_logprobs or 0 for i in which],
    )
    return dict(zip(which, found, strict=True))


@torch.no_grad()
def _log_probs(
    subject: Subject, rows: list[list[int]], begins: list[int], tops: list[int]
) -> list[Any]:
    """log p of each row's tokens from `begin` on, with the `top` likeliest in their place."""
    if not rows:
        return []
    # The first token of a row has no prediction.
    parts = [slice(max(begin, 1), len(row)) for row, begin in zip(rows, begins, strict=True)]
    states = [
        h[part.start - 1 : part.stop - 1]
        for h, part in zip(subject.hidden(rows), parts, strict=True)
    ]
    targets = [row[part] for row, part in zip(rows, parts, strict=True)]
    said = torch.tensor([t for target in targets for t in target], dtype=torch.long)[:, None]
    values = subject.log_probs(torch.cat(states), said)[:, 0].cpu()
    sizes = [len(target) for target in targets]
    return [
        inspect_ai.model.Logprobs(content=_entries(subject, target, value.tolist(), top, state))
        for target, value, top, state in zip(
            targets, values.split(sizes), tops, states, strict=True
        )
    ]


def _entries(
    subject: Subject, target: list[int], values: list[float], top: int, states: Tensor
) -> list[Any]:
    word = subject.tokenizer.decode
    best: list[Any] = [None] * len(target)
    if top and target:
        head = subject.head
        found = linear_topk(states, head.weight, top, impl=subject.impl, **head.options())
        best = [
            [inspect_ai.model.TopLogprob(token=word([i]), logprob=v) for i, v in pairs]
            for pairs in _pairs(found)
        ]
    return [
        inspect_ai.model.Logprob(token=word([token]), logprob=value, top_logprobs=others)
        for token, value, others in zip(target, values, best, strict=True)
    ]


def _pairs(found: TopK) -> Iterator[Iterator[tuple[int, float]]]:
    for ids, values in zip(found.ids.tolist(), found.logprobs.tolist(), strict=True):
        yield zip(ids, values, strict=True)
