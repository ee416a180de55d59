"""Answers to a batch of Inspect requests: new tokens and log-probabilities.

    log p(token) = z_token − lse        by linear_lse_gather; top tokens by linear_topk

Logits [tokens, vocabulary] exist only for the next token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....losses.linear_head import linear_topk
from ..subject import Subject, TokenRow
from .messages import EncodedInput
from .package import inspect_ai


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
    model = inspect_ai.model
    generated = _generate(subject, batch)
    prompt_logprobs = _log_probs(
        subject,
        {
            i: (TokenRow(r.encoded.ids, r.encoded.begin or 0), n if n > 1 else 0)
            for i, r in enumerate(batch)
            if (n := r.config.prompt_logprobs)
        },
    )
    new_logprobs = _log_probs(
        subject,
        {
            i: (
                TokenRow(r.encoded.ids + generated[i], len(r.encoded.ids)),
                r.config.top_logprobs or 0,
            )
            for i, r in enumerate(batch)
            if r.config.logprobs or r.config.top_logprobs
        },
    )
    model_outputs = []
    for i, (request, new) in enumerate(zip(batch, generated, strict=True)):
        message = model.ChatMessageAssistant(
            content=subject.text(new), model=subject.name, source="generate"
        )
        choice = model.ChatCompletionChoice(
            message=message,
            stop_reason=_stop_reason(subject, new, request),
            logprobs=new_logprobs.get(i),
            prompt_logprobs=prompt_logprobs.get(i),
        )
        n_input, n_output = len(request.encoded.ids), len(new)
        usage = model.ModelUsage(
            input_tokens=n_input, output_tokens=n_output, total_tokens=n_input + n_output
        )
        model_outputs.append(model.ModelOutput(model=subject.name, choices=[choice], usage=usage))
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
        answers = subject.generate_ids(
            [batch[i].encoded.ids for i in indices],
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
            streams=[batch[i].stream for i in indices],
        )
        for i, ids in zip(indices, answers, strict=True):
            new[i] = ids
    return new


@torch.no_grad()
def _log_probs(subject: Subject, requests: Mapping[int, tuple[TokenRow, int]]) -> dict[int, Any]:
    """Returns Logprobs of rows at temperature 1, each with a number of alternatives."""
    if not requests:
        return {}
    scores = subject.token_logprobs([row for row, _ in requests.values()])
    return {
        i: inspect_ai.model.Logprobs(
            content=_entries(subject, row.targets, values.tolist(), top, states)
        )
        for (i, (row, top)), (states, values) in zip(requests.items(), scores, strict=True)
    }


def _entries(
    subject: Subject, target: list[int], values: list[float], top: int, states: Tensor
) -> list[Any]:
    decode = subject.tokenizer.decode
    alternatives: list[Any] = [None] * len(target)
    if top and target:
        head = subject.head
        topk = linear_topk(states, head.weight, top, impl=subject.impl, **head.options())
        alternatives = [
            [
                inspect_ai.model.TopLogprob(token=decode([token]), logprob=value)
                for token, value in zip(ids, logprobs, strict=True)
            ]
            for ids, logprobs in zip(topk.ids.tolist(), topk.logprobs.tolist(), strict=True)
        ]
    return [
        inspect_ai.model.Logprob(token=decode([token]), logprob=value, top_logprobs=others)
        for token, value, others in zip(target, values, alternatives, strict=True)
    ]
