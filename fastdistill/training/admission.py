"""Which teachers a student can learn from: loaded, placed and compared before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from ..cache import TeacherCache
from ..fingerprint import refuse_different_tokenizers
from ..heads import rows_of_head
from ..offloading import is_offloaded
from ..positions import RowLimit
from ..protocols import DenseTeacher, TopKTeacher
from ..served import ServedTeacher
from ..shared_storage import models_in, shared_parameters
from ..teacher import Teacher
from .config import DistillConfig
from .offline import refuse_unfit

logger = logging.getLogger(__name__)

_UNPROVED = (
    " Pass processing_class and the teacher's tokenizer to have it proved that they share a "
    "vocabulary."
)
Given: TypeAlias = TopKTeacher | DenseTeacher | PreTrainedModel | str | Path


@dataclass(frozen=True)
class Admitted:
    """A teacher that fits, and how many rows of the student's head are real tokens (None: all)."""

    teacher: Any
    valid_vocab: int | None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.teacher, "tokenizer", None)


@dataclass(frozen=True)
class Outline:
    """A teacher that was not loaded: its tokenizer, and how many rows its head has and how long a
    row it reads, where that is known."""

    tokenizer: Any = None
    vocab_size: int | None = None
    row_limit: RowLimit | None = None


def admit(
    teacher: Given | None, student: nn.Module, config: DistillConfig, processing_class: Any
) -> Admitted | None:
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
    placed = isinstance(teacher, Teacher) and (
        hasattr(teacher.model, "hf_device_map") or is_offloaded(teacher.model)
    )
    if isinstance(teacher, Teacher) and not placed:
        teacher.to(config.device)
    return Admitted(teacher, vocab)


def check_fit(
    teacher: Any, student: nn.Module, config: DistillConfig, processing_class: Any
) -> int | None:
    """Return how many rows of both heads are shared tokens, None where all are.

    Needs no weights: the student may be on the meta device, and the teacher an Outline.

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
    if not isinstance(teacher, Outline):
        _refuse_unfit(teacher, config)
    if isinstance(teacher, TeacherCache):
        refuse_unfit(teacher, config, processing_class)
    if isinstance(teacher, ServedTeacher) and processing_class is not None:
        teacher.refuse_tokenizer(processing_class)
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
    froze = {id(p) for p in frozen}
    trained = {name for name, p in student.named_parameters() if p.requires_grad or id(p) in froze}
    shared = [name for name in shared_parameters(student, models) if name in trained]
    if not shared:
        return
    if len(shared) == len(trained):
        what = f"the student itself ({len(shared)} shared weights, first: {shared[0]})"
    else:
        some = ", ".join(shared[:8]) + (", …" if len(shared) > 8 else "")
        what = f"one that shares {len(shared)} of the student's {len(trained)} weights: {some}"
    raise ValueError(
        f"teacher: expected another model, got {what}. What trains the one would change or freeze "
        "the other: build the student from copies (copy.deepcopy), load the teacher a second time, "
        "or freeze in the student what shall stay as it is before the teacher is made"
    )


def _refuse_unfit(teacher: Any, config: DistillConfig) -> None:
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
    theirs = getattr(teacher, "tokenizer", None)
    compared = processing_class is not None and (theirs is not None or _has_compared(teacher))
    if processing_class is not None and theirs is not None:
        refuse_different_tokenizers(processing_class, theirs)
    ours = rows_of_head(student)
    vocab = getattr(teacher, "vocab_size", None)
    if vocab is None:
        logger.warning(
            "%s does not say how many ids its teacher has: it is taken to have the %d of the "
            "student's head; %s.%s",
            *(type(teacher).__name__, ours),
            "others count as padding" if hasattr(teacher, "valid_vocab") else "others are refused",
            "" if compared else _UNPROVED,
        )
        return None
    if vocab == ours:
        return None
    logger.warning(
        "The student's head has %d rows and the teacher's %d: both are cut to the first "
        "%d, the others count as padding.%s",
        *(ours, vocab, min(vocab, ours), "" if compared else _UNPROVED),
    )
    return min(vocab, ours)


def _has_compared(teacher: Any) -> bool:
    """Whether a cache or server knows its teacher's tokenizer, and so refused another one."""
    if isinstance(teacher, TeacherCache):
        return teacher.manifest.settings.tokenizer_sha256 is not None
    described = getattr(teacher, "described", None)
    return getattr(described, "tokenizer_sha256", None) is not None
