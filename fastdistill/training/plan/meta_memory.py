"""Measures the memory of a forward and backward pass on tensors without data.

On the meta device every operation creates a tensor of the right size without values. Within
`MemoryTracker`, three things are added:

    memory       bytes of the live storages, and their peak
    conditions   a model that tests for padding gets the answer that the plan assumes
    attention    the fused kernel that the device would use, which never stores the scores

Early releases of transformers 5 also ask whether autocast is on, which torch does not support for
the meta device.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_autocast = torch.is_autocast_enabled
MOST_OPERATIONS = 150_000  # a layer that loops over tokens runs millions


class MemoryTracker:
    """Context manager that counts the live bytes of operations' results, and their peak.

    Args:
        model: its own tensors do not count.
        device: "cpu" or "cuda", which determines the attention kernel.
        padded: whether a batch's rows have unequal lengths, which needs a mask.
    """

    def __init__(self, model: nn.Module, device: str, *, padded: bool) -> None:
        self._live = LiveMemory(*model.parameters(), *model.buffers(), limit=MOST_OPERATIONS)
        self._overrides = _MetaOverrides(device, padded)
        self._stack = ExitStack()

    def __enter__(self) -> MemoryTracker:
        self._stack.enter_context(patch.object(torch, "is_autocast_enabled", _is_autocast_enabled))
        self._stack.enter_context(self._overrides)
        self._stack.enter_context(self._live)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def in_recomputation(self) -> tuple[Any, Any]:
        """Return contexts for a checkpoint's forward pass and recomputation, as context_fn.

        The autograd engine runs the recomputation without function modes.
        """
        return nullcontext(), self._overrides

    @property
    def now(self) -> int:
        return self._live.now

    def peak(self) -> int:
        """Return the peak since the last call."""
        peak, self._live.peak = self._live.peak, self._live.now
        return peak


def _is_autocast_enabled(*device_type: str) -> bool:
    return device_type != ("meta",) and _autocast(*device_type)


class LiveMemory(TorchDispatchMode):
    """Mode that counts the bytes of tensors on the meta device: `now`, and at their `peak`.

    Args:
        held: tensors that do not count.
        limit: the most operations that may run; None allows any number.
    """

    def __init__(self, *held: Tensor, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.operations = 0
        self.limit = limit
        self.storages = {t.untyped_storage()._cdata for t in held}

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.operations += 1
        if self.limit is not None and self.operations > self.limit:
            raise NotImplementedError(
                f"more than {self.limit} operations in one pass: its layers loop over tokens here"
            )
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.storages:
                    self.storages.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._release, key, size)
        return out

    def _release(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


class _MetaOverrides(TorchFunctionMode):
    def __init__(self, device: str, padded: bool) -> None:
        super().__init__()
        self.device, self.padded = device, padded

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__bool__ and args[0].is_meta:
            # Tests whether every token is attended, or each row is one sequence.
            return not self.padded
        if function is Tensor.__contains__ and args[0].is_meta:
            return False  # tests for a padding token
        is_attention = function is F.scaled_dot_product_attention and args[0].is_meta
        fused = _fused_attention(self.device, *args, **kwargs) if is_attention else None
        if fused is not None:
            return fused
        if function in _GROUPED and args[0].is_meta and args[0].dtype != torch.bfloat16:
            # PyTorch supports only bfloat16 on meta tensors; kernels support other types too.
            return _GroupedProduct.apply(args[0], args[1])  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)


def _fused_attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Return the output of a device's fused kernel; None if a CPU has none, by a query to torch."""

    def sample(t: Tensor) -> Tensor:
        like = torch.empty(1, t.shape[1], 16, t.shape[-1], dtype=t.dtype, device="cpu")
        return like.requires_grad_(t.requires_grad)

    if device == "cpu":
        mask = attn_mask
        if mask is not None:
            mask = torch.ones(1, 1, 16, 16, dtype=mask.dtype, device="cpu")
        samples = (sample(query), sample(key), sample(value), mask)
        with torch.enable_grad():
            chosen = torch._fused_sdp_choice(*samples, dropout_p, is_causal, enable_gqa=enable_gqa)
        if chosen == torch.nn.attention.SDPBackend.MATH.value:
            return None
    return _FusedAttention.apply(query, key, value, attn_mask, device)  # type: ignore[no-untyped-call]


_GROUPED = [
    f
    for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))
    if f is not None
]


class _GroupedProduct(torch.autograd.Function):
    """Allocates the tensors of [S, in] · [experts, in, out], one expert's weight per row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(rows.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class _FusedAttention(torch.autograd.Function):
    """Allocates the tensors of a fused attention kernel.

    It keeps queries, keys, values, the mask as a bias of their type, the output [B, T, heads, D]
    and a log-sum-exp per row. A GPU sums dQ in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, device: str
    ) -> Tensor:
        B, heads, T, _ = query.shape
        bias = None
        if mask is not None:
            bias = mask if mask.dtype == query.dtype else mask.to(query.dtype)
        out = query.new_empty(B, T, heads, value.shape[-1]).transpose(1, 2)
        lse = query.new_empty(B, heads, T, dtype=torch.float32)
        ctx.device = device
        ctx.save_for_backward(query, key, value, bias, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        if ctx.device == "cuda":
            torch.empty_like(query, dtype=torch.float32)
        return *grads, None, None
