"""On-policy batches: the student continues prompts, and learns from what the teacher says of that.

Whether a step samples, and every token it samples, follow from the seed, the step and the prompt by
hashing: not from a random stream. The same run gives the same samples however its batches are cut
over micro-batches and processes, and whether or not it was interrupted.

    step s is on-policy where h(seed, s) < lmbda
    token j of a completion is the first whose cumulative probability exceeds h(seed, s, prompt, j)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from ..data import padded
from ..examples import IGNORE_INDEX, Row
from ..heads import evaluating
from .config import DistillConfig


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def is_on_policy(config: DistillConfig, step: int) -> bool:
    return uniform("on-policy", config.seed, step) < config.lmbda


def prompts_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What comes before each row's first target; the whole row where nothing else is prompt.

    A row whose every token is a target has no prompt of its own: it is continued from its end.
    """
    columns = (batch[name].cpu() for name in ("input_ids", "attention_mask", "labels"))
    found = []
    for ids, mask, labels in zip(*columns, strict=True):
        ids, labels = ids[mask != 0], labels[mask != 0]
        at = (labels != IGNORE_INDEX).nonzero()[:, 0].tolist()
        first = at[0] if at and at[0] > 1 else len(ids)
        found.append(ids[:first])
    return found


class _KeyedChoice(LogitsProcessor):
    """Leaves one token per row, drawn from the row's distribution at its key's number."""

    def __init__(self, keys: list[tuple[object, ...]], prompt_length: int) -> None:
        self.keys, self.prompt_length = keys, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        j = input_ids.shape[1] - self.prompt_length
        numbers = [uniform(*key, j) for key in self.keys]
        shares = scores.double().softmax(-1).cumsum(-1)
        at = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None]
        chosen = torch.searchsorted(shares, at * shares[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


@torch.no_grad()
def sample(
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    config: DistillConfig,
    step: int,
    pad_id: int,
    ends: list[int],
    vocab: int | None,
    synced: bool,
) -> dict[str, Tensor]:
    """A batch of the same prompts with completions of the student's own as targets.

    Args:
        model: the transformers model of the student, unwrapped. ends: ids that end a completion.
        vocab: ids from here on are padding of the student's head and are never drawn.
        synced: other processes generate at the same time and must take as many steps.

    Raises:
        ValueError: a prompt and max_new_tokens do not fit the model's positions.
    """
    device = batch["input_ids"].device
    prompts = prompts_of(batch)
    longest = max(map(len, prompts))
    _refuse_too_long(model, longest, config.max_new_tokens)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    choice = _KeyedChoice(_keys(config, step, prompts), longest)
    settings = _plainly(config.max_new_tokens, pad_id, ends)
    with evaluating(model), _generating_by(model, settings):
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([*_shaping(config, vocab), choice]),
            synced_gpus=synced,
        )
    completions = out[:, longest:].cpu()
    rows = [_row(p, c, ends) for p, c in zip(prompts, completions, strict=True)]
    return {name: column.to(device) for name, column in padded(rows, pad_id).items()}


def _keys(config: DistillConfig, step: int, prompts: list[Tensor]) -> list[tuple[object, ...]]:
    """One per prompt; equal prompts of a batch are told apart by their count."""
    seen: Counter[str] = Counter()
    keys: list[tuple[object, ...]] = []
    for prompt in prompts:
        digest = hashlib.blake2b(prompt.numpy().tobytes(), digest_size=16).hexdigest()
        keys.append((config.seed, step, digest, seen[digest]))
        seen[digest] += 1
    return keys


class _OnlyTokens(LogitsProcessor):
    """Rows of the head that are padding are never drawn."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.vocab :] = -torch.inf
        return scores


def _shaping(config: DistillConfig, vocab: int | None) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = [] if vocab is None else [_OnlyTokens(vocab)]
    if config.sampling_temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(config.sampling_temperature)))
    if config.top_p < 1.0:
        found.append(TopPLogitsWarper(float(config.top_p)))
    return found


@contextmanager
def _generating_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """For a while the model has no generation settings of its own: what a call leaves open, such as
    a repetition penalty, transformers would take from there."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def _plainly(max_new_tokens: int, pad_id: int, ends: list[int]) -> GenerationConfig:
    """Greedy over what the processors leave."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id,
        eos_token_id=ends or None,
    )


def _row(prompt: Tensor, completion: Tensor, ends: list[int]) -> Row:
    """The completion up to and with its first end; what generate padded behind it is dropped."""
    stops = torch.isin(completion, torch.tensor(ends, dtype=completion.dtype)).nonzero()[:, 0]
    said = completion[: int(stops[0]) + 1] if len(stops) else completion
    ids = torch.cat([prompt, said])
    targets = torch.cat([torch.full_like(prompt, IGNORE_INDEX), said])
    return Row(ids, targets, torch.ones_like(ids))


def _refuse_too_long(model: Any, prompt: int, new: int) -> None:
    config: Any = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"max_new_tokens: expected at most {limit - prompt} behind a prompt of {prompt} tokens "
            f"(the model has {limit} positions), got {new}. Shorten it, or the examples by "
            "max_length"
        )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the model's own, which may be several, and the tokenizer's.

    `model` is the transformers model, without adapters.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(found) if isinstance(found, (list, tuple)) else {found}
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return sorted(i for i in ids if i is not None)
