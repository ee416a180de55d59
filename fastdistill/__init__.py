"""Distillation losses computed from hidden states and the LM head, and a trainer.

Every public name is imported on first use, so that `import fastdistill` is instant and the losses
do not import transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .runtime.lazy import lazy_names
from .runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from . import compat
    from .hf.token_map import TokenMap
    from .losses.dense import linear_distill_loss
    from .losses.draft import acceptance_length, dpace_weights
    from .losses.linear_head import linear_logprobs_at, linear_lse_gather, linear_topk
    from .losses.modules import LinearDistillLoss, TopKDistillLoss
    from .losses.scores import token_scores
    from .losses.topk import topk_distill, topk_distill_loss
    from .losses.types import DistillOutput, SelectedLogits, TokenScores, TopK
    from .quant import Int8Linear, LUT4Linear, quantize_model, save_quantized
    from .teachers.cache import CacheError, TeacherCache
    from .teachers.fidelity import FidelityReport
    from .teachers.http import OpenAISampler, ServedTeacher
    from .teachers.local import Teacher, load_teacher
    from .teachers.mapped import MappedTeacher
    from .teachers.routed import RoutedTeacher
    from .teachers.vllm_hidden_states import VLLMHiddenStates
    from .training.config import DistillConfig
    from .training.self_teacher import SelfTeacher
    from .training.trainer import DistillTrainer

__all__ = [
    "CacheError",
    "DistillConfig",
    "DistillOutput",
    "DistillTrainer",
    "FidelityReport",
    "Int8Linear",
    "LUT4Linear",
    "LinearDistillLoss",
    "MappedTeacher",
    "OpenAISampler",
    "RoutedTeacher",
    "SelectedLogits",
    "SelfTeacher",
    "ServedTeacher",
    "Teacher",
    "TeacherCache",
    "TokenMap",
    "TokenScores",
    "TopK",
    "TopKDistillLoss",
    "VLLMHiddenStates",
    "acceptance_length",
    "compat",
    "dpace_weights",
    "linear_distill_loss",
    "linear_logprobs_at",
    "linear_lse_gather",
    "linear_topk",
    "load_teacher",
    "quantize_model",
    "save_quantized",
    "token_scores",
    "topk_distill",
    "topk_distill_loss",
]

_NAMES_OF = {
    "teachers.cache": ("CacheError", "TeacherCache"),
    "hf.token_map": ("TokenMap",),
    "losses.dense": ("linear_distill_loss",),
    "losses.draft": ("acceptance_length", "dpace_weights"),
    "teachers.fidelity": ("FidelityReport",),
    "losses.topk": ("topk_distill", "topk_distill_loss"),
    "losses.modules": ("LinearDistillLoss", "TopKDistillLoss"),
    "losses.types": ("DistillOutput", "SelectedLogits", "TokenScores", "TopK"),
    "losses.linear_head": ("linear_logprobs_at", "linear_lse_gather", "linear_topk"),
    "quant": ("Int8Linear", "LUT4Linear", "quantize_model", "save_quantized"),
    "losses.scores": ("token_scores",),
    "teachers.http": ("OpenAISampler", "ServedTeacher"),
    "teachers.local": ("Teacher", "load_teacher"),
    "teachers.mapped": ("MappedTeacher",),
    "teachers.routed": ("RoutedTeacher",),
    "teachers.vllm_hidden_states": ("VLLMHiddenStates",),
    "training.config": ("DistillConfig",),
    "training.self_teacher": ("SelfTeacher",),
    "training.trainer": ("DistillTrainer",),
}
_import_name = lazy_names(
    __name__,
    {name: module for module, names in _NAMES_OF.items() for name in names},
    extra_of={
        "teachers.cache": "cache",
        "teachers.http": "cache",
        "teachers.vllm_hidden_states": "cache",
    },
)


def __getattr__(name: str) -> Any:
    if name == "compat":
        return import_module(".compat", __name__)
    return _import_name(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
