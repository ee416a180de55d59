"""Determines how many tokens a causal language model reads, and whether it respects padding.

Both are measured on the model if possible: families differ in where positions begin (OPT's table
has two more rows than positions), and some models accept an attention mask and ignore it (RWKV).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..losses.vocab_parallel import is_dtensor
from ..runtime import checks
from .lm_head import evaluating, generation_settings, is_partitioned
from .offloading import resident_device

if TYPE_CHECKING:
    from .encoder import EncodedExample, Encoder

# Entries of configurations with a length; the first also stands for n_positions, context_length.
_STATED = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
_TRIAL = 4  # tokens of the trial row that detects a table of positions

# Relative errors of logits: other pad tokens must change nothing; another layout sums in another
# order. The same for fp64: many families compute the softmax in fp32.
_SAME_LAYOUT, _OTHER_LAYOUT = 1e-4, 1e-3
_SAME_LAYOUT_HALF, _OTHER_LAYOUT_HALF = 1e-2, 1e-1
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class RowLimit:
    """The longest row that a model or a server reads.

    tokens: its length. reader: the model's or server's name in errors. hint: advice for errors.
    """

    tokens: int
    reader: str
    hint: str = ""

    def check(self, length: int, name: str, index: int) -> None:
        """Raise ValueError for a row of more tokens, with its index in `name`."""
        if length <= self.tokens:
            return
        hint = f"cut the rows to max_length={self.tokens}, or leave this one out"
        checks.fail(
            name,
            f"rows of at most {self.tokens} tokens, which is what {self.reader} reads",
            f"{length} tokens in row {index}",
            hint + self.hint,
        )


def check_room(limit: RowLimit | None, rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for the first prompt after which `limit` leaves no token to generate."""
    for index, row in enumerate(rows):
        if limit is not None and len(row) >= limit.tokens:
            checks.fail(
                "prompt",
                f"at most {limit.tokens - 1} tokens, to leave room for a new one: "
                f"{limit.reader} reads {limit.tokens}",
                f"{len(row)} tokens in row {index}",
                f"shorten the prompt{limit.hint}",
            )


def check_new_tokens(limit: RowLimit, prompt: int, new: int, where: str = "") -> None:
    """Raise ValueError if a prompt and its completion exceed `limit`."""
    if prompt + new > limit.tokens:
        checks.fail(
            "max_new_tokens",
            f"at most {limit.tokens - prompt} after a prompt of {prompt} tokens{where}, since "
            f"{limit.reader} reads {limit.tokens}",
            new,
            f"shorten it, or the examples by max_length{limit.hint}",
        )


def attended_length(row: EncodedExample) -> int:
    """Return the number of attended tokens of a row."""
    return int((row.attention_mask != 0).sum())


def check_row_lengths(
    name: str,
    dataset: Any,
    encoder: Encoder,
    limits: Sequence[RowLimit | None],
    visit: Callable[[int, Any, EncodedExample], None] | None = None,
) -> None:
    """Raise ValueError for the first example of a dataset that is longer than one of the limits.

    Every example is read, since a single long one would stop a run midway. Nothing is read if the
    encoder's max_length is within the limits. A stream is left to the collator, which checks its
    batches. `visit` is called with the index, the example and the uncut row of each example read.
    """
    shortest = shortest_of(limits)
    if shortest is None or dataset is None or not hasattr(dataset, "__len__"):
        return
    if encoder.max_length is not None and encoder.max_length <= shortest.tokens:
        return
    for index in range(len(dataset)):
        example = dataset[index]
        row = encoder.encode_uncut(example, index, name)
        shortest.check(attended_length(row.truncate(encoder.max_length)), name, index)
        if visit is not None:
            visit(index, example, row)


def shortest_of(limits: Sequence[RowLimit | None]) -> RowLimit | None:
    return min((x for x in limits if x is not None), key=lambda x: x.tokens, default=None)


def row_limit(role: str, model: nn.Module) -> RowLimit | None:
    """Return the longest row of `model`; None if nothing limits it. Errors name it by its role.

    For learned positions it is the size of their table. For computed positions (rotary, ALiBi) it
    is the configuration's limit times its scaling factor: longer rows run, but their quality
    degrades silently.
    """
    reader = f"the {role} ({type(model).__name__})"
    whole = not is_partitioned(model) and not any(p.is_meta for p in model.parameters())
    table = _table_of_positions(model) if whole else None
    if table is not None:
        return RowLimit(tokens=table, reader=reader)
    config = text_config(model)
    stated = {name: getattr(config, name, None) for name in _STATED}
    limits = {n: v for n, v in stated.items() if type(v) is int and v > 0}
    if not limits:
        return None
    name = min(limits, key=lambda n: limits[n])
    hint = f"; if the model supports longer rows, set model.config.{name} first"
    return RowLimit(tokens=_scaled(config, limits[name]), reader=reader, hint=hint)


def _scaled(config: Any, stated: int) -> int:
    """Return the limit of rotary positions with their scaling, at least `stated`."""
    limit = stated
    for scaling in rope_scalings(config):
        factor = scaling.get("factor")
        original = scaling.get("original_max_position_embeddings") or stated
        if isinstance(factor, (int, float)) and math.isfinite(factor * original):
            limit = max(limit, int(factor * original))
    return limit


def rope_scalings(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of rotary positions, of each type of layer if there are several."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [r for r in rope.values() if isinstance(r, dict)] or [rope]


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model in a model, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


class _Tables(TorchDispatchMode):
    """Finds tables of learned positions: embeddings whose indices increase by 1 along a row.

    Use it in a forward pass of one repeated token."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            weight, indices = args[0], args[1]
            if is_dtensor(indices):
                indices = indices.to_local()
            if indices.dim() and indices.shape[-1] == _TRIAL and indices.device.type != "meta":
                row = indices.reshape(-1, _TRIAL)[0].tolist()
                if all(b - a == 1 for a, b in pairwise(row)):
                    self.limits.append(weight.shape[0] - row[0])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _table_of_positions(model: Any) -> int | None:
    """Return the usable rows of the smallest table of learned positions, None without any."""
    device = reading_device(model)
    ids = torch.ones(1, _TRIAL, dtype=torch.long, device=device)
    with evaluating(model), _Tables() as tables:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return min(tables.limits, default=None)


@torch.no_grad()
def respects_padding(model: Any) -> bool:
    """Whether `generate` gives a left-padded, masked row the same logits as the row alone.

    It generates two tokens: the logits must neither depend on the padding token nor differ from
    those of the unpadded row. If False, each row must be generated alone: RWKV mixes rows of equal
    length too.
    """
    weight = model.get_input_embeddings().weight
    vocab = getattr(weight, "ds_shape", weight.shape)[0]
    short = [(3 + 7 * i) % vocab for i in range(3)]
    long = [(5 + 3 * i) % vocab for i in range(6)]
    alone = _generated_logits(model, [short], 0)
    padded, other = (_generated_logits(model, [short, long], pad)[:1] for pad in (0, vocab - 1))
    half = weight.dtype in _HALF
    same = _SAME_LAYOUT_HALF if half else _SAME_LAYOUT
    moved = _OTHER_LAYOUT_HALF if half else _OTHER_LAYOUT
    return bool(
        (relative_errors(other, padded) <= same).all()
        and (relative_errors(padded, alone) <= moved).all()
    )


def _generated_logits(model: Any, rows: Sequence[list[int]], pad: int) -> Tensor:  # (B, 2, V)
    """Return the logits of two steps of `generate`, with a fixed token chosen in between."""
    device, width = reading_device(model), max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    from transformers import GenerationConfig, LogitsProcessorList

    watch = _Watch()
    plain = GenerationConfig(max_new_tokens=2, do_sample=False, num_beams=1, pad_token_id=pad)
    with evaluating(model), generation_settings(model, plain):
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=plain,
            logits_processor=LogitsProcessorList([watch]),
        )
    return torch.stack(watch.logits, 1)


class _Watch:  # a LogitsProcessor
    """Records the logits of each step and always chooses token 1, so that runs are comparable."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, min(1, scores.shape[-1] - 1)] = 0.0
        return chosen


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return |actual − expected| / |expected| of each vector."""
    off: Tensor = (actual.double() - expected.double()).norm(dim=-1)
    size: Tensor = expected.double().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return off / size


def reading_device(model: Any) -> torch.device:
    """Return the device of the input embedding."""
    return resident_device(model.get_input_embeddings())
