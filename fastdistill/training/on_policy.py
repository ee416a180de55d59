"""On-policy batches: the student samples completions, and the teacher scores them.

The seed, the step and the prompt determine by a hash whether a step samples, and every sampled
token; there is no random stream. So a run gives the same samples for any micro-batch size and
number of processes, and after an interruption.

    step s is on-policy where h(seed, s) < lmbda
    token j of a completion is the first whose cumulative probability exceeds h(seed, s, prompt, j)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from ..hf.chat import turn_end
from ..hf.collator import padded
from ..hf.encoder import IGNORE_INDEX, EncodedExample, Encoder
from ..hf.generation import ends_of, generate_rows
from ..hf.lm_head import rows_of_head
from ..hf.positions import RowLimit, check_new_tokens, row_limit, shortest_of
from ..runtime import checks
from .checks.dataset import some_of
from .config import DistillConfig
from .samplers import Sampler, SampleRequest, sampled_by

EXCERPTS = 3  # samples per log
# Entries of a batch that do not depend on the completions.
_CARRIED = ("teacher_prompt_ids", "teacher_prompt_mask", "columns")
PROMPT_CHARS, COMPLETION_CHARS = 200, 400  # of a sample in the log


def uniform(*key: object) -> float:
    """Return a number in [0, 1) that depends only on the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def is_on_policy(config: DistillConfig, step: int) -> bool:
    return uniform("on-policy", config.seed, step) < config.lmbda


def prompts_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the prompt tokens of each row, from prompt_mask as DistillCollator makes it.

    In a batch without prompt_mask, a prompt is everything before the first target. It is the whole
    row if at most one token comes before, since the first token is never a target.

    Raises:
        ValueError: a row without a prompt.
    """
    if "prompt_mask" in batch:
        ids, mask = batch["input_ids"].cpu(), batch["prompt_mask"].cpu()
        prompts = [row[chosen != 0] for row, chosen in zip(ids, mask, strict=True)]
        for index, prompt in enumerate(prompts):
            if not len(prompt):
                checks.fail(
                    "prompt",
                    "at least one token to continue",
                    "an empty prompt and a tokenizer without a BOS token (example "
                    f"{index} of its batch)",
                    "add a BOS token to the prompt",
                )
        return prompts
    columns = (batch[name].cpu() for name in ("input_ids", "attention_mask", "labels"))
    prompts = []
    for ids, mask, labels in zip(*columns, strict=True):
        ids, labels = ids[mask != 0], labels[mask != 0]
        target_positions = (labels != IGNORE_INDEX).nonzero()[:, 0].tolist()
        first = target_positions[0] if target_positions and target_positions[0] > 1 else len(ids)
        prompts.append(ids[:first])
    return prompts


class _KeyedChoice(LogitsProcessor):
    """Selects one token per row by inverse transform sampling at the uniform of the row's key."""

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
    limits: Sequence[RowLimit] | None = None,
    sampler: Sampler | None = None,
) -> dict[str, Tensor]:
    """Return a batch of the same prompts, with completions sampled by the student as targets.

    Args:
        model: the student's transformers model, unwrapped. ends: ids that end a completion.
        vocab: ids from here on are padding of the student's head and are never sampled.
        synced: other processes generate at the same time and must run the same number of steps.
        limits: the longest rows that student and teacher can read; None uses the student's.
        sampler: samples instead of the student in this process.

    Raises:
        ValueError: a prompt with max_new_tokens is longer than one of the limits, or the sampler's
            completions are invalid.
    """
    device = batch["input_ids"].device
    prompts = prompts_of(batch)
    limit = shortest_of([row_limit("student", model)] if limits is None else limits)
    keys = _keys(config, step, prompts)
    if sampler is not None:
        if limit is not None:
            for i, prompt in enumerate(prompts):
                check_new_tokens(limit, len(prompt), config.max_new_tokens, f" (row {i})")
        request = SampleRequest(
            [prompt.tolist() for prompt in prompts],
            [int(uniform(*key) * 2**31) for key in keys],
            config.max_new_tokens,
            config.sampling_temperature,
            config.top_p,
            ends,
            rows_of_head(model) if vocab is None else vocab,
            model,
            step,
        )
        new = sampled_by(sampler, request)
    else:
        new = _generate(model, prompts, keys, config, pad_id, ends, vocab, synced, limit, device)
    rows = []
    for prompt, tokens in zip(prompts, new, strict=True):
        completion = torch.tensor(tokens, dtype=torch.long)
        ids = torch.cat([prompt, completion])
        targets = torch.cat([torch.full_like(prompt, IGNORE_INDEX), completion])
        rows.append(EncodedExample(ids, targets, torch.ones_like(ids)))
    carried = {name: batch[name] for name in _CARRIED if name in batch}
    return {name: x.to(device) for name, x in padded(rows, pad_id).items()} | carried


def _generate(
    model: Any,
    prompts: list[Tensor],
    keys: list[tuple[object, ...]],
    config: DistillConfig,
    pad_id: int,
    ends: list[int],
    vocab: int | None,
    synced: bool,
    limit: RowLimit | None,
    device: torch.device,
) -> list[list[int]]:
    """Return completions of the student in this process; keys determine every token."""

    def chosen(rows: list[int], width: int) -> list[LogitsProcessor]:
        padding = [] if vocab is None else list(range(vocab, rows_of_head(model)))
        processors: list[LogitsProcessor] = []
        if padding:
            processors.append(SuppressTokensLogitsProcessor(padding, device=str(device)))
        if config.sampling_temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(config.sampling_temperature)))
        if config.top_p < 1.0:
            processors.append(TopPLogitsWarper(float(config.top_p)))
        return [*processors, _KeyedChoice([keys[i] for i in rows], width)]

    return generate_rows(
        model,
        [prompt.tolist() for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        pad_id=pad_id,
        ends=ends,
        device=device,
        processors=chosen,
        synced=synced,
        limit=limit,
        shorten=False,
    )


def excerpts(batch: Mapping[str, Tensor], tokenizer: Any) -> list[dict[str, str]]:
    """Return the first rows of a sampled batch as text: the end of the prompt, the completion."""
    columns = (batch[name][:EXCERPTS].cpu() for name in ("input_ids", "attention_mask", "labels"))
    texts = []
    for ids, mask, labels in zip(*columns, strict=True):
        is_sampled = labels != IGNORE_INDEX
        prompt = tokenizer.decode(ids[(mask != 0) & ~is_sampled])
        completion = tokenizer.decode(ids[is_sampled])
        texts.append(
            {
                "prompt": prompt if len(prompt) <= PROMPT_CHARS else f"…{prompt[-PROMPT_CHARS:]}",
                "completion": completion
                if len(completion) <= COMPLETION_CHARS
                else f"{completion[:COMPLETION_CHARS]}…",
            }
        )
    return texts


def _keys(config: DistillConfig, step: int, prompts: list[Tensor]) -> list[tuple[object, ...]]:
    """Return a key per prompt; equal prompts in a batch are distinguished by a counter."""
    seen: Counter[str] = Counter()
    keys: list[tuple[object, ...]] = []
    for prompt in prompts:
        digest = hashlib.blake2b(prompt.numpy().tobytes(), digest_size=16).hexdigest()
        keys.append((config.seed, step, digest, seen[digest]))
        seen[digest] += 1
    return keys


def set_generation_ends(model: Any, encoder: Encoder, dataset: Any) -> None:
    """Add the end-of-turn token to the student's eos_token_id if it trains on conversations.

    Otherwise a saved model would continue after its turn, if the end of a turn is another token
    than the end of a text. Conversations are examples with that token. A stream, which reading
    would consume, is assumed to have conversations.
    """
    settings, end = getattr(model, "generation_config", None), turn_end(encoder.tokenizer)
    if settings is None or end is None or dataset is None:
        return
    rows = [encoder.encode_uncut(example, i, "train_dataset") for i, example in some_of(dataset)]
    if not hasattr(dataset, "__len__") or any((row.ids == end).any() for row in rows):
        settings.eos_token_id = ends_of(model, encoder.tokenizer)
