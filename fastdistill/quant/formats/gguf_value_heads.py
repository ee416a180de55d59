"""Orders the value heads of Qwen3.5's linear attention, which .gguf files have in another order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.checks import fail
from ..schemes import take_columns

Order = Callable[[int], Tensor]  # the number of rows -> the order in which to take them


class ValueHeads(NamedTuple):
    """The value heads of Qwen3.5's linear attention.

    A file has them ordered by (value head of a key head, key head), transformers by (key head,
    value head of it)."""

    keys: int
    values: int
    width: int
    first: int  # rows of queries and keys, before those of values

    @classmethod
    def of(cls, config: dict[str, Any]) -> ValueHeads | None:
        """Return those of a config; None if it has no linear attention."""
        if "linear_num_key_heads" not in config:
            return None
        keys, values = (config[f"linear_num_{part}_heads"] for part in ("key", "value"))
        first = 2 * keys * config["linear_key_head_dim"]
        return cls(keys, values, config["linear_value_head_dim"], first)

    def rows(self, stored: str) -> Order | None:
        """Return the order of a tensor's rows; None if it has none for value heads."""
        part = stored.split(".")[2] if stored.startswith("blk.") else ""
        if part in ("attn_qkv", "ssm_conv1d"):
            return functools.partial(self._order, width=self.width, first=self.first)
        width = self.width if part == "attn_gate" else 1
        of_heads = ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt")
        return functools.partial(self._order, width=width, first=0) if part in of_heads else None

    def columns(self, weight: Any) -> Any:  # inside `reading`
        """Return a matrix whose columns are of value heads, in transformers' order."""
        if (columns := weight.shape[-1]) != self.values * self.width:
            fail("data", f"{self.values * self.width} columns, {self.width} of each head", columns)
        heads = self._order(self.values, 1, 0)
        if isinstance(weight, Tensor):
            return weight.view(len(weight), self.values, -1)[:, heads].reshape(weight.shape)
        return take_columns(weight, heads)

    def _order(self, rows: int, width: int, first: int) -> Tensor:  # inside `reading`
        if rows != first + self.values * width:
            fail("data", f"{first + self.values * width} rows, {width} of each head", rows)
        heads = torch.arange(first, rows).view(-1, self.keys, width).transpose(0, 1)
        return torch.cat([torch.arange(first), heads.reshape(-1)])
