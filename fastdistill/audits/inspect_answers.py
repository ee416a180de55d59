"""Answers to a batch of Inspect requests: new tokens and log-probabilities.

    log p(token) = z_token − lse        by linear_lse_gather; top tokens by linear_topk

Logits [tokens, vocabulary] exist only for the next token.
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
    """A pending request."""

    encoded: EncodedInput
    config: Any  # GenerateConfig
    stream: int  # of the random numbers
    wake: Any  # anyio.Event: set once answered, or when this request should run the next batch
    outcome: Any = None  # ModelOutput or Exception


def outputs(subject: Subject, batch: list[InspectRequest]) -> list[Any]:
    """Returns a ModelOutput per request."""
    generated = _generate(subject, batch)
    texts = [subject.text(ids) for ids in generated]
    prompt_logprobs, new_logprobs = (
        _prompt_logprobs(subject, batch),
        _new_logprobs(subject, batch, generated),
    )
    model_outputs = []
    for i, request in enumerate(batch):
        message = inspect_ai.model.ChatMessageAssistant(
            content=texts[i], model=subject.name, source="generate"
        )
        choice = inspect_ai.model.ChatCompletionChoice(
            message=message,
            stop_reason=_stop_reason(subject, generated[i], request),
            logprobs=new_logprobs.get(i),
            prompt_logprobs=prompt_logprobs.get(i),
        )
        n_input, n_output = len(request.encoded.ids), len(generated[i])
        usage = inspect_ai.model.ModelUsage(
            input_tokens=n_input, output_tokens=n_output, total_tokens=n_input + n_output
        )
        model_outputs.append(
            inspect_ai.model.ModelOutput(model=subject.name, choices=[choice], usage=usage)
        )
    return model_outputs


def _stop_reason(subject: Subject, new: list[int], request: InspectRequest) -> str:
    if subject.is_ended(new) or not new:  # nothing is generated where a completion is scored
        return "stop"
    return "max_tokens" if len(new) >= request.config.max_tokens else "model_length"


def _generate(subject: Subject, batch: list[InspectRequest]) -> list[list[int]]:
    """Returns the new tokens of each request; none for a completion that is only scored."""
    new: list[list[int]] = [[] for _ in batch]
    batches: dict[tuple[int, float, int], list[int]] = {}
    for i, request in enumerate(batch):
        config = request.config
        if request.encoded.begin is None and config.max_tokens:
            settings = (config.max_tokens, config.temperature or 0.0, config.seed or 0)
            batches.setdefault(settings, []).append(i)
    for (tokens, temperature, seed), indices in batches.items():
        for start in range(0, len(indices), GENERATION_BATCH):
            chunk = indices[start : start + GENERATION_BATCH]
            answers = subject.generate_ids(
                [batch[i].encoded.ids for i in chunk],
                max_new_tokens=tokens,
                temperature=temperature,
                seed=seed,
                streams=[batch[i].stream for i in chunk],
            )
            for i, ids in zip(chunk, answers, strict=True):
                new[i] = ids
    return new


def _prompt_logprobs(subject: Subject, batch: list[InspectRequest]) -> dict[int, Any]:
    """Returns log-probabilities of the prompt tokens, or of the completion tokens only."""
    indices = [i for i, a in enumerate(batch) if a.config.prompt_logprobs]
    requests = [batch[i] for i in indices]
    logprobs = _log_probs(
        subject,
        [a.encoded.ids for a in requests],
        [a.encoded.begin or 0 for a in requests],
        [a.config.prompt_logprobs if a.config.prompt_logprobs > 1 else 0 for a in requests],
    )
    return dict(zip(indices, logprobs, strict=True))


def _new_logprobs(
    subject: Subject, batch: list[InspectRequest], new: list[list[int]]
) -> dict[int, Any]:
    """Returns log-probabilities of the generated tokens, at temperature 1."""
    indices = [i for i, a in enumerate(batch) if a.config.logprobs or a.config.top_logprobs]
    logprobs = _log_probs(
        subject,
        [batch[i].encoded.ids + new[i] for i in indices],
        [len(batch[i].encoded.ids) for i in indices],
        [batch[i].config.top_logprobs or 0 for i in indices],
    )
    return dict(zip(indices, logprobs, strict=True))


@torch.no_grad()
def _log_probs(
    subject: Subject, rows: list[list[int]], begins: list[int], tops: list[int]
) -> list[Any]:
    """Returns log p of each row's tokens from `begin` on, with the `top` alternatives of each."""
    if not rows:
        return []
    # The first token of a row has no prediction.
    parts = [slice(max(begin, 1), len(row)) for row, begin in zip(rows, begins, strict=True)]
    states = [
        h[part.start - 1 : part.stop - 1]
        for h, part in zip(subject.hidden(rows), parts, strict=True)
    ]
    targets = [row[part] for row, part in zip(rows, parts, strict=True)]
    ids = torch.tensor([t for target in targets for t in target], dtype=torch.long)[:, None]
    values = subject.log_probs(torch.cat(states), ids)[:, 0].cpu()
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
    decode = subject.tokenizer.decode
    alternatives: list[Any] = [None] * len(target)
    if top and target:
        head = subject.head
        likeliest = linear_topk(states, head.weight, top, impl=subject.impl, **head.options())
        alternatives = [
            [inspect_ai.model.TopLogprob(token=decode([i]), logprob=v) for i, v in pairs]
            for pairs in _id_logprob_pairs(likeliest)
        ]
    return [
        inspect_ai.model.Logprob(token=decode([token]), logprob=value, top_logprobs=others)
        for token, value, others in zip(target, values, alternatives, strict=True)
    ]


def _id_logprob_pairs(topk: TopK) -> Iterator[Iterator[tuple[int, float]]]:
    for ids, values in zip(topk.ids.tolist(), topk.logprobs.tolist(), strict=True):
        yield zip(ids, values, strict=True)
