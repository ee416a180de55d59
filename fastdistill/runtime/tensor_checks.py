"""Checks of tensors: type, dtype, shape and device. Each error names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import fail

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def values_readable(tensor: Tensor, check: bool) -> bool:
    """Whether values may be read: never inside a traced graph."""
    if torch.compiler.is_compiling():
        return False
    return check or tensor.device.type == "cpu"


def tensor(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    if isinstance(value, Tensor) and value.dtype in dtypes:
        return
    names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of {names}, got {type(value).__name__}")
    raise TypeError(f"{name}: expected dtype {names}, got {value.dtype}")


def like_tokens(name: str, value: Tensor, hidden: Tensor) -> None:
    """Check that `value` has one entry per position of `hidden`, on the same device."""
    if value.shape != hidden.shape[:-1]:
        fail(name, f"shape {list(hidden.shape[:-1])} as hidden's positions", list(value.shape))
    same_device(name, value, hidden)


def same_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        fail(name, f"device {hidden.device} as hidden", value.device)


def batch(input_ids: Any, attention_mask: Any) -> None:
    """Check token ids [B, T] and the shape of their mask, a tensor or None."""
    tensor("input_ids", input_ids, INTS)
    shape = list(input_ids.shape)
    if len(shape) != 2:
        fail("input_ids", "shape [B, T]", shape, "add a dimension with input_ids[None]")
    if attention_mask is not None and list(attention_mask.shape) != shape:
        fail("attention_mask", f"shape {shape} as input_ids", list(attention_mask.shape))
