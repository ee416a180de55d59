"""Distillation losses straight from hidden states and the LM head, and a trainer around them.

Importing this costs what importing torch costs: the trainer, which needs transformers, is loaded
when it is first named.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat
from .dense import linear_distill_loss
from .losses import topk_distill, topk_distill_loss
from .modules import LinearDistillLoss, TopKDistillLoss
from .outputs import DistillOutput, SelectedLogits, TokenScores, TopK
from .primitive import linear_lse_gather, linear_topk
from .scores import token_scores

if TYPE_CHECKING:
    from .config import DistillConfig
    from .trainer import DistillTrainer

__version__ = "0.1.0"

__all__ = [
    "DistillConfig",
    "DistillOutput",
    "DistillTrainer",
    "LinearDistillLoss",
    "SelectedLogits",
    "TokenScores",
    "TopK",
    "TopKDistillLoss",
    "compat",
    "linear_distill_loss",
    "linear_lse_gather",
    "linear_topk",
    "token_scores",
    "topk_distill",
    "topk_distill_loss",
]

_LATER = {"DistillConfig": "config", "DistillTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
