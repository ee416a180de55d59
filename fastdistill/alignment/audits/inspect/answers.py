"""Answers to a batch of Inspect requests: new tokens, or log-probabilities of the prompt.

log p(token) = z_token − lse        by linear_lse_gather, no [tokens, vocabulary] logits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..subject import Subject, TokenRow
from .messages import EncodedInput
from .package import inspect_ai


@dataclass(eq=False)
class InspectRequest:
    """A pending request."""

    encoded: EncodedInput
    config: Any  # GenerateConfig
    stream: int  # of the random numbers
    outcome: Any = None  # ModelOutput or Exception


def outputs(subject: Subject, batch: list[InspectRequest]) -> list[Any]:
    """Returns a ModelOutput per request."""
    model = inspect_ai.model
    generated = _generate(subject, batch)
    prompt_logprobs = _prompt_logprobs(subject, batch)
    model_outputs = []
    for i, (request, new) in enumerate(zip(batch, generated, strict=True)):
        message = model.ChatMessageAssistant(
            content=subject.text(new), model=subject.name, source="generate"
        )
        choice = model.ChatCompletionChoice(
            message=message,
            stop_reason=_stop_reason(subject, new, request),
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


def _prompt_logprobs(subject: Subject, batch: list[InspectRequest]) -> dict[int, Any]:
    """Returns Logprobs of the completion, or of the whole input, where they are requested."""
    requests = {i: r.encoded for i, r in enumerate(batch) if r.config.prompt_logprobs}
    if not requests:
        return {}
    model, decode = inspect_ai.model, subject.tokenizer.decode
    rows = [TokenRow(encoded.ids, encoded.begin or 0) for encoded in requests.values()]
    logprobs = subject.token_logprobs(rows, subject.predicting_states(rows))
    return {
        i: model.Logprobs(
            content=[
                model.Logprob(token=decode([token]), logprob=value)
                for token, value in zip(row.targets, values.tolist(), strict=True)
            ]
        )
        for i, row, values in zip(requests, rows, logprobs, strict=True)
    }
