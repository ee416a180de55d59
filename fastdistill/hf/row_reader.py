"""Runs rows of unequal length through a causal language model with minimal padding.

The attended tokens of a batch are extracted, rows are sorted by length and grouped under a token
budget, and each group runs in the cheaper of two layouts:

    padded    one row per sequence, padded on the right. A causal model only looks left, so no mask
              is needed, and attention takes its fast causal path.
    packed    all rows concatenated, with positions restarting at 0, by which transformers separates
              them: FlashAttention with its varlen kernel, at no cost; SDPA with a block-diagonal
              mask, which computes the masked products too.

Positions count attended tokens from 0, so left padding, right padding and no padding give the same
answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import checks, tensor_checks
from .layer_outputs import layer_outputs
from .lm_head import evaluating, head_of, hidden_states
from .positions import (
    RowLimit,
    reading_device,
    relative_errors,
    rope_scalings,
    row_limit,
    text_config,
)

CPU_TOKENS = 4096
GPU_TOKENS = (1024, 16384)  # fewer leave a GPU idle, more gain nothing
FREE_SHARE = 0.25
# Values per token alive at once in a forward pass without gradients, in units of the hidden size:
# residual stream, queries, keys, values and the MLP's inner activations of one layer.
VALUES_PER_TOKEN = 32

# Attention separates rows by restarting positions; recurrent layers carry state across rows.
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")

# Relative errors of hidden states, medians over tokens: rounding may route a few tokens of a
# mixture to other experts, while a wrong mask or position changes nearly all tokens. The same
# layout with other rows must agree far better than another layout, which sums in another order.
_SAME_LAYOUT = {torch.float64: 1e-6, torch.float32: 1e-4}
_OTHER_LAYOUT = {torch.float64: 1e-6, torch.float32: 1e-3}
_SAME_LAYOUT_HALF, _OTHER_LAYOUT_HALF = 1e-2, 1e-1


@dataclass(frozen=True)
class Rows:
    """The attended tokens of a batch [B, T], concatenated by row."""

    tokens: Tensor  # (N,) int64
    where: Tensor  # (N,) positions in the flattened batch
    lengths: list[int]  # [B], sum N
    shape: tuple[int, int]

    @property
    def attended(self) -> Tensor:  # (B, T) bool
        flat = torch.zeros(self.shape, dtype=torch.bool, device=self.where.device).view(-1)
        return flat.index_fill(0, self.where, True).view(self.shape)


def read_rows(input_ids: Any, attention_mask: Any, vocab: int) -> Rows:
    """Check a batch and extract its attended tokens.

    Ids are checked on GPUs too: the sync is short, and an id outside the embedding would end the
    process with a device-side assertion."""
    if attention_mask is not None:
        tensor_checks.tensor("attention_mask", attention_mask, (torch.bool, *tensor_checks.INTS))
    tensor_checks.batch(input_ids, attention_mask)
    B, T = input_ids.shape
    flat = input_ids.reshape(-1)
    if attention_mask is None:
        where = torch.arange(B * T, device=flat.device)
        lengths = [T] * B
    else:
        mask = attention_mask.to(flat.device)
        invalid = mask[(mask != 0) & (mask != 1)]
        if invalid.numel():
            checks.fail("attention_mask", "1 for a token and 0 for padding", int(invalid[0]))
        where = mask.reshape(-1).nonzero()[:, 0]
        lengths = mask.bool().sum(-1).tolist()
    tokens = flat[where].long()
    if tokens.numel():
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= vocab:
            checks.fail(
                "input_ids",
                f"tokens in 0..{vocab - 1} wherever attention_mask is 1",
                low if low < 0 else high,
            )
    return Rows(tokens, where, lengths, (B, T))


class BatchedForward:
    """Runs the rows of a batch through `model`, about `tokens_per_batch` tokens at a time.

    `can_pack` decides whether rows may be packed, and `row_limit` how long they may be.

    Raises:
        ValueError: the model is not causal, or tokens_per_batch is no positive integer.
    """

    def __init__(self, model: nn.Module, tokens_per_batch: int | None = None) -> None:
        checks.integer("tokens_per_batch", tokens_per_batch, 1, optional=True)
        self.model = model
        self.tokens_per_batch = tokens_per_batch
        self.packs = can_pack(model)
        self.row_limit: RowLimit | None = row_limit("model", model)
        self._hidden_size = int(getattr(text_config(model), "hidden_size", 0))
        self._max_packed_length = rope_limit(model)

    @property
    def vocab(self) -> int:
        """The number of ids that the model reads: rows of its input embedding."""
        return len(_embedding(self.model).weight)

    @property
    def budget(self) -> int:
        """Tokens in one forward pass, padding included."""
        device = reading_device(self.model)
        if self.tokens_per_batch is not None:
            return self.tokens_per_batch
        if device.type != "cuda":
            return CPU_TOKENS
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        item: int = _embedding(self.model).weight.element_size()
        fits = int(free * FREE_SHARE) // (VALUES_PER_TOKEN * item * max(self._hidden_size, 1))
        return min(max(fits, GPU_TOKENS[0]), GPU_TOKENS[1])

    def read(
        self,
        rows: Rows,
        images: Mapping[str, Tensor] | None = None,
        layers: Sequence[int] = (),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (positions in the flattened batch (n,), their hidden states (n, H)) per group.

        With `layers`, the states are (n, L + 1, H): the outputs of these L layers, then the last.
        Rows with images run in one padded group, because the images of a batch are one tensor.
        Raises ValueError for a row longer than the model's limit, before anything runs."""
        if self.row_limit is not None:
            for index, length in enumerate(rows.lengths):
                self.row_limit.check(length, "input_ids", index)
        if images:
            yield rows.where, _with_images(self.model, rows, images)
            return
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        varlen = self.packs and "flash" in str(attention)
        starts = [0, *accumulate(rows.lengths)]
        for group in groups(rows.lengths, self.budget, varlen, self._max_packed_length):
            lengths = [rows.lengths[i] for i in group]
            at = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in group])
            at = at.to(rows.tokens.device)
            run = _packed if self._packed_is_cheaper(lengths, varlen) else _padded
            yield rows.where[at], run(self.model, rows.tokens[at], lengths, layers)

    def hidden(
        self,
        rows: Rows,
        images: Mapping[str, Tensor] | None = None,
        layers: Sequence[int] = (),
    ) -> Tensor:  # (B, T, H) or (B, T, L + 1, H), zero where nothing is attended
        """Return the hidden states of the whole batch, on the batch's device."""
        weight, states = head_of(self.model).weight, (len(layers) + 1,) if layers else ()
        shape = (*rows.shape, *states, weight.shape[1])
        out = weight.new_zeros(shape, device=rows.where.device)
        flat = out.flatten(0, 1)
        for where, hidden in self.read(rows, images, layers):
            flat[where] = hidden.to(out)
        return out

    def _packed_is_cheaper(self, lengths: list[int], varlen: bool) -> bool:
        """Compare FLOPs: a layer's GEMMs take about 24 H² per token, attention 4 H per pair."""
        tokens, padded = sum(lengths), len(lengths) * max(lengths)
        if not self.packs or tokens == padded:
            return False
        product = 6 * self._hidden_size
        return varlen or tokens * (product + tokens) < padded * (product + max(lengths))


def groups(
    lengths: Sequence[int], budget: int, varlen: bool, max_packed_length: float
) -> list[list[int]]:
    """Group row indices, sorted by descending length, under the token budget.

    The longest come first, so a budget too large for the memory fails at once. Without a varlen
    kernel, a group that fills a quarter of the budget takes no row shorter than ¾ of its longest.
    Empty rows are left out; a row above the budget or `max_packed_length` runs alone.
    """
    batches: list[list[int]] = []
    longest = total = 0
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        group = batches[-1] if batches else []
        size = total + lengths[i] if varlen else longest * (len(group) + 1)
        wasteful = not varlen and 4 * total >= budget and 4 * lengths[i] < 3 * longest
        if not group or size > budget or wasteful or longest > max_packed_length:
            group, longest, total = [], lengths[i], 0
            batches.append(group)
        group.append(i)
        total += lengths[i]
    return batches


def _packed(model: nn.Module, tokens: Tensor, lengths: list[int], layers: Sequence[int]) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in lengths])
    return _forward(model, tokens[None], positions[None], layers)[0]


def _with_images(model: nn.Module, rows: Rows, images: Mapping[str, Tensor]) -> Tensor:
    device = reading_device(model)
    ids = rows.tokens.new_zeros(rows.attended.numel())
    ids[rows.where] = rows.tokens
    tensors = {name: tensor.to(device) for name, tensor in images.items()}
    with evaluating(model):
        mask = rows.attended.long().to(device)
        hidden = hidden_states(model, ids.view(rows.shape).to(device), mask, **tensors)
    return hidden.flatten(0, 1)[rows.where.to(hidden.device)]


def _padded(model: nn.Module, tokens: Tensor, lengths: list[int], layers: Sequence[int]) -> Tensor:
    longest = max(lengths)
    inside = torch.cat([torch.arange(n) + row * longest for row, n in enumerate(lengths)])
    ids = tokens.new_zeros(len(lengths) * longest)
    ids[inside.to(ids.device)] = tokens
    hidden = _forward(model, ids.view(-1, longest), None, layers)
    return hidden.flatten(0, 1)[inside.to(hidden.device)]


def _forward(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    layers: Sequence[int] = (),
) -> Tensor:
    device = reading_device(model)
    inputs = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    with evaluating(model), layer_outputs(model, layers) as outputs:
        last = hidden_states(model, input_ids.to(device), **inputs)
    return torch.stack([*(output.to(last) for output in outputs), last], -2) if layers else last


@torch.no_grad()
def can_pack(model: nn.Module) -> bool:
    """Whether packed rows give the same hidden states as separate rows.

    By rule: the model takes position_ids, has no recurrent state and no buffer with a fixed causal
    mask (GPT-Neo's limits a packed row to the length of a single one), and all its layers are full
    or sliding attention. By trial: the second of two packed rows must neither depend on the first
    one's tokens nor differ from the same row in first place.

    Raises:
        ValueError: the model is not causal, so its prediction of a token depends on that token.
    """
    vocab = _embedding(model).weight.shape[0]
    first, other, second = (torch.arange(s, s + n) * 7 % vocab for s, n in ((1, 5), (3, 5), (2, 7)))
    by_rule = _packable_by_rule(model)

    def run(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.cat([torch.arange(len(left)), torch.arange(len(right))])[None]
        hidden = _forward(model, torch.cat([left, right])[None], positions if by_rule else None)[0]
        return hidden[: len(left)], hidden[len(left) :]

    front, second_hidden = run(first, second)
    if not bool(front.isfinite().all()):
        raise ValueError(
            "model: expected finite hidden states, got NaN or infinity from "
            f"{type(model).__name__} for the tokens {first.tolist()}. Its weights are NaN, "
            f"infinite, or too large for {str(front.dtype).removeprefix('torch.')}"
        )
    same_layout = _SAME_LAYOUT.get(front.dtype, _SAME_LAYOUT_HALF)
    if not _error(run(first, second.flip(0))[0], front) <= same_layout:
        raise ValueError(
            f"model: expected a causal language model, got {type(model).__name__}, whose hidden "
            "state of a token depends on later tokens. A teacher that sees the next token cannot "
            "teach to predict it: load a decoder with AutoModelForCausalLM"
        )
    if not by_rule:
        return False
    other_layout = _OTHER_LAYOUT.get(front.dtype, _OTHER_LAYOUT_HALF)
    return (
        _error(run(other, second)[1], second_hidden) <= same_layout
        and _error(run(second, first)[0], second_hidden) <= other_layout
    )


def _packable_by_rule(model: nn.Module) -> bool:
    config = text_config(model)
    layers = set(getattr(config, "layer_types", None) or ())
    inside: Any = model
    if hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()
    takes_positions = "position_ids" in inspect.signature(inside.forward).parameters
    stateful = bool(getattr(model, "_is_stateful", False))
    return (
        takes_positions
        and not stateful
        and layers <= _PACKABLE_LAYERS
        and not any(map(_is_mask_table, inside.buffers()))
    )


def _is_mask_table(buffer: Tensor) -> bool:
    square = buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1
    return square and buffer.dtype in (torch.bool, torch.uint8)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of |actual − expected| / |expected|."""
    return float(relative_errors(actual, expected).median())


def rope_limit(model: nn.Module) -> float:
    """Return the row length above which rotary frequencies depend on the batch's longest row.

    Longer rows run alone, so that no row depends on another's length."""
    config = text_config(model)
    own_limit: float = getattr(config, "max_position_embeddings", 0)
    limits = [
        float(r.get("original_max_position_embeddings") or own_limit)
        for r in rope_scalings(config)
        if r.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min(limits, default=float("inf"))


def _embedding(model: nn.Module) -> Any:
    return model.get_input_embeddings()  # type: ignore[operator]
