"""The losses of fastdistill on hidden states and an LM head, for the `kernels` hub.

This is the __init__.py of the package that hub/assemble.py writes; it holds copies of
fastdistill/losses, fastdistill/runtime and kernels/, and needs torch only.
"""

from .losses.dense import linear_distill_loss
from .losses.linear_head import linear_lse_gather, linear_topk
from .losses.scores import token_scores
from .losses.topk import topk_distill, topk_distill_loss
from .losses.types import TopK

__all__ = [
    "TopK",
    "linear_distill_loss",
    "linear_lse_gather",
    "linear_topk",
    "token_scores",
    "topk_distill",
    "topk_distill_loss",
]
