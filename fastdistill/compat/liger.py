"""Liger Kernel's fused linear JSD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses.dense import linear_distill_loss
from ..runtime import checks


class FusedLinearJSD(nn.Module):
    """Generalized JSD between two LM heads, with Liger Kernel's arguments.

        JSD_β = β·KL(p‖m) + (1−β)·KL(q‖m),  m = βp + (1−β)q;  β = 0, 1 mean forward, reverse KL

    To switch: from fastdistill.compat import FusedLinearJSD as LigerFusedLinearJSD.
    The loss is the mean over positions whose label is not ignore_index (over all without labels).

    Args:
        jsd_beta: β in [0, 1]. ignore_index: label of positions to ignore.
        temperature: divides both logits.
        accum_dtype: None or torch.float32; gradients are always summed in float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if accum_dtype not in (None, torch.float32):
            hint = "gradients are summed in float32 here"
            checks.fail("accum_dtype", "None or torch.float32", accum_dtype, hint)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the scalar loss.

        student_input [N, H], student_weight [V, H], teacher_input [N, G], teacher_weight [V, G],
        shift_labels [N] or None.
        """
        return linear_distill_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            labels=shift_labels,
            divergence="jsd",
            beta=self.jsd_beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
        )
