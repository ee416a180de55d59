"""The format of answers on disk: 4.2 bytes per slot.

    n tokens · k slots · T temperatures, the first one T₀ · B = ⌈V / 65536⌉ blocks of ids

    ids       uint16 [n, k]  id mod 65536, ascending by id, used slots first
    blocks    uint8 [n, B]   number of a token's ids in each block (uint16 for k ≥ 256)
    logprobs  fp16 [n, k]    ln p at T₀
    log_tail  fp32 [n, T]    ln of the mass outside the ids, at every temperature
    shift     fp32 [n, T]    ln(1 − exp(log_tail_T)) − ln Σ_S exp(logprobs · T₀/T)

Ascending ids need no high bits: the counts per block restore them, and also give the number of used
slots. One equation gives every temperature, with ids and tail summing to 1 despite fp16 rounding:

    ln p_T = logprobs · T₀/T + shift_T

Without the shift the KL of a student near its teacher has a first-order error, the mass lost to
rounding. With it the error is of second order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...losses.types import TopK

BLOCK = 1 << 16
_TABLE = 256  # slots
Array = NDArray[np.generic]


class Packed(NamedTuple):
    """Answers of n tokens as they are stored; see the module for the types."""

    ids: Array
    blocks: Array
    logprobs: Array
    log_tail: Array
    shift: Array

    @classmethod
    def zeros(cls, n: int, k: int, blocks: int, temperatures: int) -> Packed:
        columns = layout(k, blocks, temperatures)
        return cls(**{name: np.zeros((n, width), kind) for name, (kind, width) in columns.items()})

    def at(self, index: Any) -> Packed:
        """Return the answers of these tokens: a slice or a mask."""
        return Packed(*(tensor[index] for tensor in self))


def layout(k: int, blocks: int, temperatures: int) -> dict[str, tuple[np.dtype[Any], int]]:
    """Return the type and the values per token of each array."""
    return {
        "ids": (np.dtype(np.uint16), k),
        "blocks": (np.dtype(np.uint8 if k < 1 << 8 else np.uint16), blocks),
        "logprobs": (np.dtype(np.float16), k),
        "log_tail": (np.dtype(np.float32), temperatures),
        "shift": (np.dtype(np.float32), temperatures),
    }


def bytes_per_token(k: int, blocks: int, temperatures: int) -> int:
    return sum(kind.itemsize * width for kind, width in layout(k, blocks, temperatures).values())


def pack(answers: list[TopK], k: int, blocks: int) -> Packed:
    """Pack checked answers [n, ≤ k], one per temperature, from any device."""
    first = answers[0]
    n, width = first.ids.shape
    ids, order = torch.where(first.ids < 0, blocks * BLOCK, first.ids.long()).sort(-1)
    logprobs = first.logprobs.float().gather(-1, order)
    bounds = torch.arange(blocks + 1, device=ids.device) * BLOCK
    below = torch.searchsorted(ids, bounds.expand(n, -1).contiguous())
    unused = ids >= blocks * BLOCK
    rounded = logprobs.half().masked_fill(unused, 0.0)
    packed = Packed.zeros(n, k, blocks, len(answers))
    packed.ids[:, :width] = (ids % BLOCK).to(torch.int32).cpu().numpy()
    packed.blocks[:] = below.diff(dim=-1).cpu().numpy()
    packed.logprobs[:, :width] = rounded.cpu().numpy()
    for i, answer in enumerate(answers):
        tail = answer.tail().float().double()
        scaled = rounded.double() * (first.temperature / answer.temperature)
        mass = scaled.masked_fill(unused, -torch.inf).logsumexp(-1)
        shift = torch.where(mass.isfinite(), torch.log(-torch.expm1(tail)) - mass, 0.0)
        packed.log_tail[:, i] = tail.float().cpu().numpy()
        packed.shift[:, i] = shift.float().cpu().numpy()
    return packed


def unpack(packed: Packed, at: int, scale: float, draws: int | None, out: TopK) -> None:
    """Unpack the answers of temperature `at` into `out`: ids int32 [n, k], the others fp32.

    `scale` is T₀/T. `draws`: logprobs are of counts among so many draws, and are restored exactly.
    """
    ids, logprobs, log_tail, _ = out
    assert log_tail is not None
    n, k = packed.ids.shape
    below = torch.from_numpy(packed.blocks.astype(np.int64)).cumsum(-1)
    np.copyto(ids.numpy(), packed.ids)  # torch's cast of uint16 is not vectorized
    for block in range(below.shape[-1] - 1):
        ids += _steps(below[:, block], k)
    logprobs.copy_(torch.from_numpy(packed.logprobs))
    if draws is not None:
        logprobs.copy_((logprobs.exp() * draws).round_().div_(draws).log_())
    else:
        if scale != 1.0:
            logprobs *= scale
        logprobs += torch.from_numpy(packed.shift[:, at : at + 1])
    log_tail.copy_(torch.from_numpy(packed.log_tail[:, at]))
    used = below[:, -1:]
    if n and int(used.min()) < k:
        empty = torch.arange(k) >= used
        ids.masked_fill_(empty, -1)
        logprobs.masked_fill_(empty, -torch.inf)


def _steps(first: Tensor, k: int) -> Tensor:
    """BLOCK from slot `first` (n,) on and 0 before it, int32 [n, k]."""
    if k > _TABLE:
        return (torch.arange(k) >= first[:, None]).int() * BLOCK
    return _table(k).index_select(0, first)


@functools.cache
def _table(k: int) -> Tensor:
    """All rows that `_steps` can return: a lookup is eight times faster than computing one."""
    return (torch.arange(k) >= torch.arange(k + 1)[:, None]).int() * BLOCK


def truncate_k(answer: TopK, k: int) -> TopK:
    """Return the k likeliest slots, with the mass of the others added to the tail."""
    if k == answer.ids.shape[-1]:
        return answer
    assert answer.log_tail is not None
    top_logprobs, order = answer.logprobs.topk(k, dim=-1, sorted=False)
    others = answer.logprobs.scatter(-1, order, -torch.inf)
    tail = torch.logaddexp(answer.log_tail, others.logsumexp(-1))
    return TopK(
        answer.ids.gather(-1, order.to(torch.int64)), top_logprobs, tail, answer.temperature
    )
