"""Merges quantized weights as transformers merges dense ones: the experts of a mixture.

The rules of transformers stack and concatenate rows. Codes, scales and offsets have the same rows
as the weight, so the same rule applies to each of them, and the merged weight keeps its bits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .schemes import Int8Weight, Lut4Weight, QuantWeight

Run = Callable[[Sequence[Callable[[], Tensor]]], dict[str, Any]]


def merge_weights(values: Sequence[QuantWeight], rule: Any, run: Run) -> QuantWeight | None:
    """Return the merged weight, or None if the rule does not keep its bits.

    Args:
        values: of the sources. rule: of transformers. run: a `runner` of it."""

    def merge(tensors: Sequence[Tensor]) -> Tensor:
        (merged,) = run([functools.partial(_identity, tensor) for tensor in tensors]).values()
        return cast(Tensor, merged)

    first = values[0]
    K, block = first.shape[1], first.block
    if not _keeps_rows(rule) or K % block or K % 2:
        return None
    if any(type(v) is not type(first) or v.block != block or v.shape[1] != K for v in values):
        return None
    if isinstance(first, Int8Weight):
        weights8 = [v for v in values if isinstance(v, Int8Weight)]
        qdata = merge([v.qdata for v in weights8]).reshape(-1, K)
        scale = merge([v.scale.view(-1, K // block) for v in weights8])
        return replace(first, shape=(len(qdata), K), qdata=qdata, scale=scale.reshape(-1))
    weights4 = [v for v in values if isinstance(v, Lut4Weight)]
    offsets = [v.offset for v in weights4 if v.offset is not None]
    same_lut = all(torch.equal(v.lut, first.lut) for v in weights4)
    if not same_lut or len(offsets) not in (0, len(values)) or _sorted_columns(weights4):
        return None
    qdata = merge([v.qdata.view(-1, K // 2) for v in weights4]).reshape(-1, K // 2)
    by_row = (-1, K // block)
    return replace(
        first,
        shape=(len(qdata), K),
        qdata=qdata.reshape(-1),
        scale=merge([v.scales.view(by_row) for v in weights4]).reshape(-1),
        offset=merge([v.view(by_row) for v in offsets]).reshape(-1) if offsets else None,
    )


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _sorted_columns(values: Sequence[Lut4Weight]) -> bool:
    return any(v.perm is not None for v in values)


def _keeps_rows(rule: Any) -> bool:
    """Whether a rule only stacks matrices and concatenates their rows."""
    if not isinstance(rule, WeightConverter):
        return False
    dims = 2
    for operation in rule.operations:
        if isinstance(operation, MergeModulelist) and operation.dim == 0:
            dims = 3
        elif not isinstance(operation, Concatenate) or operation.dim != dims - 2:
            return False
    return True


def runner(
    rule: Any, target: str, sources: Sequence[tuple[str, str | None]], **context: Any
) -> Run:
    """Return a function that runs a rule of transformers on one tensor per source.

    Args:
        rule: of transformers. target: the name of the weight.
        sources: (stored name, pattern) of each tensor.
        context: the model and its config.
    """

    def run(reads: Sequence[Callable[[], Tensor]]) -> dict[str, Any]:
        converter = copy.deepcopy(rule)
        for (stored, pattern), read in zip(sources, reads, strict=True):
            converter.add_tensor(target, stored, pattern, read)
        converted: dict[str, Any] = converter.convert(target, **context)
        return {name: v[0] if isinstance(v, list) else v for name, v in converted.items()}

    return run
