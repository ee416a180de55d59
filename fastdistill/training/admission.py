"""Which teachers a student can learn from: loaded, placed and compared before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from ..cache import TeacherCache
from ..fingerprint import check_same_tokenizer
from ..heads import rows_of_head
from ..offloading import is_offloaded
from ..positions import RowLimit
from ..protocols import DenseTeacher, TopKTeacher
from ..served import ServedTeacher
from ..shared_storage import models_in, shared_parameters
from ..teacher import Teacher
from .config import DistillConfig
from .offline import check_cache_settings

logger = logging.getLogger(__name__)

_TOKENIZERS_NOT_COMPARED = (
    " Pass processing_class and the teacher's tokenizer to have it proved that they share a "
    "vocabulary."
)
TeacherLike: TypeAlias = TopKTeacher | DenseTeacher | PreTrainedModel | str | Path


@dataclass(frozen=True)
class ResolvedTeacher:
    """A teacher that fits, and how many rows of the student's head are real tokens (None: all)."""

    teacher: Any
    valid_vocab: int | None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.teacher, "tokenizer", None)


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher that was not loaded: its tokenizer, and how many rows its head has and how long a
    row it reads, where that is known."""

    tokenizer: Any = None
    vocab_size: int | None = None
    row_limit: RowLimit | None = None


def resolve_teacher(
    teacher: TeacherLike | None, student: nn.Module, config: DistillConfig, processing_class: Any
) -> ResolvedTeacher | None:
    """Raises ValueError or TypeError for what cannot teach this student."""
    if teacher is not None:
        check_own_weights(teacher, student)
    loadable = isinstance(teacher, (nn.Module, str, Path))
    if loadable and not isinstance(teacher, (TopKTeacher, DenseTeacher)):
        teacher = Teacher(teacher, impl=config.impl)
    vocab = check_fit(teacher, student, config, processing_class)
    if teacher is None:
        return None
    if hasattr(teacher, "valid_vocab"):
        # A server or cache that does not know its teacher's size is cut as one that does.
        unknown = getattr(teacher, "vocab_size", None) is None
        teacher.valid_vocab = rows_of_head(student) if vocab is None and unknown else vocab
    has_placement = isinstance(teacher, Teacher) and (
        hasattr(teacher.model, "hf_device_map") or is_offloaded(teacher.model)
    )
    if isinstance(teacher, Teacher) and not has_placement:
        teacher.to(config.device)
    return ResolvedTeacher(teacher, vocab)


def check_fit(
    teacher: Any, student: nn.Module, config: DistillConfig, processing_class: Any
) -> int | None:
    """Return how many rows of both heads are shared tokens, None where all are.

    Needs no weights: the student may be on the meta device, and the teacher a TeacherSpec.

    Raises:
        ValueError, TypeError: the teacher cannot teach this student what `config` asks for.
    """
    if teacher is None:
        if config.ce_weight != 1.0:
            raise ValueError(
                f"teacher: expected one, got None with ce_weight={config.ce_weight:g}. Pass a "
                "teacher, or ce_weight=1.0 to train on the labels alone"
            )
        if config.lmbda:
            raise ValueError(
                f"teacher: expected one to score what the student samples, got None with "
                f"lmbda={config.lmbda:g}"
            )
        return None
    if not isinstance(teacher, TeacherSpec):
        _check_interface(teacher, config)
    if isinstance(teacher, TeacherCache):
        check_cache_settings(teacher, config, processing_class)
    if isinstance(teacher, ServedTeacher) and processing_class is not None:
        teacher.check_tokenizer(processing_class)
    vocab = _shared_vocabulary(teacher, student, processing_class)
    rows = vocab if vocab is not None else rows_of_head(student)
    if config.k is not None and config.k > rows:
        raise ValueError(
            f"k: expected at most the vocabulary's {rows} tokens, got {config.k}. k=None compares "
            "the whole vocabulary"
        )
    return vocab


def check_own_weights(teacher: Any, student: nn.Module) -> None:
    """Raise ValueError where the student trains, or would train had the teacher not frozen it, a
    weight in the teacher's memory: the teacher would move with it, or the student stand still.

    Weights that are shared and frozen by the caller's own will are no harm.
    """
    models, frozen = models_in(teacher)
    frozen_ids = {id(p) for p in frozen}
    trained = {
        name for name, p in student.named_parameters() if p.requires_grad or id(p) in frozen_ids
    }
    shared = [name for name in shared_parameters(student, models) if name in trained]
    if not shared:
        return
    if len(shared) == len(trained):
        description = f"the student itself ({len(shared)} shared weights, first: {shared[0]})"
    else:
        names = ", ".join(shared[:8]) + (", …" if len(shared) > 8 else "")
        description = (
            f"one that shares {len(shared)} of the student's {len(trained)} weights: {names}"
        )
    raise ValueError(
        f"teacher: expected another model, got {description}. Training one would change or freeze "
        "the other. Build the student from copies (copy.deepcopy), load the teacher a second "
        "time, or freeze the shared weights of the student before you create the teacher"
    )


def _check_interface(teacher: Any, config: DistillConfig) -> None:
    if config.k is None and not isinstance(teacher, DenseTeacher):
        raise TypeError(
            "teacher: expected a model, or an object with hidden(input_ids, attention_mask) and "
            f"head, with k=None, got {type(teacher).__name__}. Give k to learn from its top k"
        )
    if config.k is not None and not isinstance(teacher, TopKTeacher):
        raise TypeError(
            "teacher: expected a model, a path, or an object with topk(input_ids, attention_mask, "
            f"*, k, temperature), got {type(teacher).__name__}"
        )


def _shared_vocabulary(teacher: Any, student: nn.Module, processing_class: Any) -> int | None:
    """The first so many ids, which both have; None where both heads have as many rows."""
    teacher_tokenizer = getattr(teacher, "tokenizer", None)
    has_compared = processing_class is not None and (
        teacher_tokenizer is not None or _has_compared_tokenizer(teacher)
    )
    if processing_class is not None and teacher_tokenizer is not None:
        check_same_tokenizer(processing_class, teacher_tokenizer)
    student_rows = rows_of_head(student)
    teacher_rows = getattr(teacher, "vocab_size", None)
    if teacher_rows is None:
        logger.warning(
            "%s does not say how many ids its teacher has: it is taken to have the %d of the "
            "student's head; %s.%s",
            *(type(teacher).__name__, student_rows),
            "others count as padding" if hasattr(teacher, "valid_vocab") else "others are refused",
            "" if has_compared else _TOKENIZERS_NOT_COMPARED,
        )
        return None
    if teacher_rows == student_rows:
        return None
    logger.warning(
        "The student's head has %d rows and the teacher's %d: both are cut to the first "
        "%d, the others count as padding.%s",
        *(
            student_rows,
            teacher_rows,
            min(teacher_rows, student_rows),
            "" if has_compared else _TOKENIZERS_NOT_COMPARED,
        ),
    )
    return min(teacher_rows, student_rows)


def _has_compared_tokenizer(teacher: Any) -> bool:
    """Whether a cache or server knows its teacher's tokenizer, and so refused another one."""
    if isinstance(teacher, TeacherCache):
        return teacher.manifest.settings.tokenizer_sha256 is not None
    described = getattr(teacher, "described", None)
    return getattr(described, "tokenizer_sha256", None) is not None
