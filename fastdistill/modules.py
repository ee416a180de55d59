"""The losses as nn.Modules: options in the constructor, tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .dense import linear_distill_loss
from .losses import topk_distill_loss
from .operands import check_divergence
from .outputs import TopK


def _check(options: dict[str, Any]) -> None:
    """Check the options that every call checks."""
    defaults = {
        "divergence": "forward_kl",
        "beta": 0.5,
        "skew": 0.1,
        "tail": "bucket",
        "allow_biased": False,
    }
    check_divergence(**{name: options.get(name, value) for name, value in defaults.items()})


class TopKDistillLoss(nn.Module):
    """`topk_distill_loss` with fixed options: TopKDistillLoss(divergence="jsd", beta=0.1).

    forward(hidden [..., H], weight [V, H], teacher: TopK, **tensors) -> Tensor, where tensors are
    labels, token_weight, num_items and bias; a call may override any option.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        _check(options)
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, teacher: TopK, **tensors: Any) -> Tensor:
        return topk_distill_loss(hidden, weight, teacher, **{**self.options, **tensors})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class LinearDistillLoss(nn.Module):
    """`linear_distill_loss` with fixed options.

    forward(hidden [..., H], weight [V, H], teacher_hidden [..., G], teacher_weight [V', G],
    **tensors) -> Tensor; a call may override any option.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        _check(options)
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **tensors: Any,
    ) -> Tensor:
        return linear_distill_loss(
            hidden, weight, teacher_hidden, teacher_weight, **{**self.options, **tensors}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
