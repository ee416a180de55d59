"""Loads a teacher, places it, and checks before the first step that it fits the student."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from ..hf.lm_head import rows_of_head
from ..hf.offloading import is_offloaded
from ..hf.positions import RowLimit
from ..hf.tokenizers import check_same_tokenizer
from ..runtime import checks
from ..teachers.cache import TeacherCache
from ..teachers.http import ServedTeacher
from ..teachers.local import Teacher, load_teacher
from ..teachers.mapped import MappedTeacher
from ..teachers.protocols import DenseTeacher, ScoringTeacher, TopKTeacher
from ..teachers.routed import RoutedTeacher
from .cached_answers import check_cache_settings
from .checks.shared_storage import models_in, shared_parameters
from .config import DistillConfig
from .self_teacher import SelfTeacher

logger = logging.getLogger(__name__)

_TOKENIZERS_NOT_COMPARED = (
    " Pass processing_class, and a teacher with a tokenizer, to verify that they share a "
    "vocabulary."
)
TeacherLike: TypeAlias = TopKTeacher | DenseTeacher | PreTrainedModel | str | Path


class ResolvedTeacher(NamedTuple):
    """A checked teacher, and the number of real tokens in the student's head (None: all rows)."""

    teacher: Any
    valid_vocab: int | None


@dataclass(frozen=True)
class TeacherSpec:
    """What is known of a teacher that was not loaded: tokenizer, head rows, longest input row."""

    tokenizer: Any = None
    vocab_size: int | None = None
    row_limit: RowLimit | None = None


def resolve_teacher(
    teacher: TeacherLike | None, student: nn.Module, config: DistillConfig, processing_class: Any
) -> ResolvedTeacher:
    """Return the teacher, loaded and placed, and the vocabulary it shares with the student.

    Raises:
        ValueError, TypeError: the teacher cannot teach this student.
    """
    if isinstance(teacher, SelfTeacher):
        if config.fsdp or config.deepspeed:
            checks.fail("teacher", "another model with FSDP or DeepSpeed", "the student itself")
        teacher.attach(student, processing_class, config.impl)
    elif teacher is not None:
        check_own_weights(teacher, student)
    loadable = isinstance(teacher, (nn.Module, str, Path))
    if loadable and not isinstance(teacher, (TopKTeacher, DenseTeacher)):
        device = None if isinstance(teacher, nn.Module) else config.device
        teacher = load_teacher(teacher, device=device, impl=config.impl)
    vocab = check_fit(teacher, student, config, processing_class)
    if teacher is not None and hasattr(teacher, "valid_vocab"):
        # Answers of a server or cache of unknown vocabulary size are cut to the student's head.
        unknown = getattr(teacher, "vocab_size", None) is None
        teacher.valid_vocab = rows_of_head(student) if vocab is None and unknown else vocab
    for local in _parts(teacher):
        if isinstance(local, Teacher):
            model = local.model
            if not (hasattr(model, "hf_device_map") or is_offloaded(model)):
                local.to(config.device)
    return ResolvedTeacher(teacher, vocab)


def _parts(teacher: Any) -> list[Any]:
    """Return the teachers inside a RoutedTeacher or a MappedTeacher, or the teacher itself."""
    if isinstance(teacher, RoutedTeacher):
        return [part for routed in teacher.teachers.values() for part in _parts(routed)]
    return _parts(teacher.teacher) if isinstance(teacher, MappedTeacher) else [teacher]


def check_fit(
    teacher: Any, student: nn.Module, config: DistillConfig, processing_class: Any
) -> int | None:
    """Return the number of tokens that both heads share, or None if all rows are shared.

    Needs no weights: the student may be on the meta device, and the teacher a TeacherSpec.

    Raises:
        ValueError, TypeError: the teacher cannot train this student with `config`.
    """
    if teacher is None:
        if config.ce_weight != 1.0:
            hint = "pass a teacher, or set ce_weight=1.0 to train on the labels alone"
            checks.fail("teacher", "a teacher", f"None with ce_weight={config.ce_weight:g}", hint)
        if config.lmbda:
            got = f"None with lmbda={config.lmbda:g}"
            checks.fail("teacher", "a teacher for the student's samples", got)
        return None
    is_spec, kind = isinstance(teacher, TeacherSpec), type(teacher).__name__
    if isinstance(teacher, TeacherCache):
        teacher.check_answers("topk")
    if config.k is None and not isinstance(teacher, DenseTeacher) and not is_spec:
        raise TypeError(
            "teacher: expected a model, or an object with hidden(input_ids, attention_mask) and "
            f"head, with k=None, got {kind}. Give k to learn from its top k"
        )
    if config.k is not None and not isinstance(teacher, TopKTeacher) and not is_spec:
        raise TypeError(
            "teacher: expected a model, a path, or an object with topk(input_ids, attention_mask, "
            f"*, k, temperature), got {kind}"
        )
    if config.support != "teacher" and not is_spec:
        _check_scores_ids(teacher)
    if isinstance(teacher, TeacherCache):
        check_cache_settings(teacher, config, processing_class)
    if isinstance(teacher, MappedTeacher) and isinstance(teacher.teacher, TeacherCache):
        check_cache_settings(teacher.teacher, config, None)
    if isinstance(teacher, ServedTeacher) and processing_class is not None:
        teacher.check_tokenizer(processing_class)
    vocab = _shared_vocabulary(teacher, student, processing_class)
    rows = vocab if vocab is not None else rows_of_head(student)
    if config.k is not None and config.k > rows:
        hint = "k=None compares the whole vocabulary"
        checks.fail("k", f"at most the vocabulary's {rows} tokens", config.k, hint)
    return vocab


def _check_scores_ids(teacher: Any) -> None:
    """Raise ValueError or TypeError unless the teacher scores the ids that a student chooses."""
    if isinstance(teacher, RoutedTeacher):
        for routed in teacher.teachers.values():
            _check_scores_ids(routed)
    elif isinstance(teacher, ServedTeacher):
        teacher.check_scores_ids("support")
    elif isinstance(teacher, TeacherCache):
        raise ValueError(
            f"support: expected 'teacher' with the cache {teacher.path}, whose answers are fixed "
            "before the student exists. Use the model or a server of fastdistill serve, or the "
            "forward KL, whose large terms are on the teacher's tokens"
        )
    elif not isinstance(teacher, (DenseTeacher, ScoringTeacher)):
        raise TypeError(
            "teacher: expected a model, or an object with logprobs_at(input_ids, attention_mask, "
            f"ids, *, temperature), with a support that is not 'teacher', got "
            f"{type(teacher).__name__}"
        )


def check_own_weights(teacher: Any, student: nn.Module) -> None:
    """Raise ValueError if the student trains a weight that shares memory with the teacher.

    Training it would change the teacher, and freezing the teacher would freeze it. Shared weights
    that the caller froze are allowed.
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


def _shared_vocabulary(teacher: Any, student: nn.Module, processing_class: Any) -> int | None:
    """Return the number of token ids that both have, or None if both heads have equal rows."""
    teacher_tokenizer = getattr(teacher, "tokenizer", None)
    is_cache = isinstance(teacher, TeacherCache)
    described = teacher.manifest.settings if is_cache else getattr(teacher, "server_info", None)
    digest = getattr(described, "tokenizer_sha256", None)
    can_compare = teacher_tokenizer is not None or digest is not None
    has_compared = processing_class is not None and can_compare
    if processing_class is not None and teacher_tokenizer is not None:
        check_same_tokenizer(processing_class, teacher_tokenizer)
    student_rows = rows_of_head(student)
    teacher_rows: int | None = getattr(teacher, "vocab_size", None)
    hint = "" if has_compared else _TOKENIZERS_NOT_COMPARED
    if teacher_rows is None:
        logger.warning(
            "%s does not report the size of its teacher's vocabulary: the %d tokens of the "
            "student's head are assumed; %s.%s",
            type(teacher).__name__,
            student_rows,
            f"other ids {'count as padding' if hasattr(teacher, 'valid_vocab') else 'are refused'}",
            hint,
        )
        return None
    if teacher_rows == student_rows:
        return None
    rows = min(teacher_rows, student_rows)
    logger.warning(
        "The student's head has %d rows and the teacher's %d: both are cut to the first "
        "%d rows; the other rows count as padding.%s",
        *(student_rows, teacher_rows, rows, hint),
    )
    return rows
