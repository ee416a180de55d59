"""The losses as nn.Modules: options in the constructor, tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..kernels.token_loss import LossOptions
from .arguments import check_options
from .dense import linear_distill_loss
from .topk import topk_distill_loss
from .types import TopK


class _FixedOptions(nn.Module):
    """Base of the modules: a loss whose options are fixed in the constructor."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        names = ("divergence", "beta", "skew", "eta", "tail", "allow_biased")
        fixed = {name: value for name, value in options.items() if name in names}
        check_options(LossOptions(**fixed))
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class TopKDistillLoss(_FixedOptions):
    """`topk_distill_loss` with fixed options: TopKDistillLoss(divergence="jsd", beta=0.1).

    forward(hidden [..., H], weight [V, H], teacher: TopK, **tensors) -> Tensor, where tensors are
    labels, token_weight, num_items and bias; a call may override any option.
    """

    def forward(self, hidden: Tensor, weight: Tensor, teacher: TopK, **tensors: Any) -> Tensor:
        return topk_distill_loss(hidden, weight, teacher, **{**self.options, **tensors})


class LinearDistillLoss(_FixedOptions):
    """`linear_distill_loss` with fixed options.

    forward(hidden [..., H], weight [V, H], teacher_hidden [..., G], teacher_weight [V', G],
    **tensors) -> Tensor; a call may override any option.
    """

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
