"""A teacher that is elsewhere. Behind a URL it is asked like a model; answers on disk are read
where batches are made, in the DataLoader's workers, and travel in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache import TeacherCache
from ..examples import IGNORE_INDEX, Encoder
from ..outputs import TopK
from ..resolve import resolve
from ..served import ServedTeacher
from .config import DistillConfig
from .data_checks import some_of

_COLUMNS = ("teacher_ids", "teacher_logprobs", "teacher_log_tail")


def open_teacher(teacher: Any) -> Any:
    """The server behind a URL, the cache in a folder; anything else as it is."""
    if not isinstance(teacher, (str, Path)):
        return teacher
    source = resolve("teacher", teacher)
    if source.kind == "server":
        return ServedTeacher(source.name)
    return TeacherCache(source.path) if source.kind == "cache" else teacher


@dataclass(frozen=True)
class CacheLookup:
    """What a collator adds to a batch; the cache travels to a worker without its open files."""

    teacher: TeacherCache
    k: int
    temperature: float

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answers = self.teacher.topk(
            batch["input_ids"], batch["attention_mask"], k=self.k, temperature=self.temperature
        )
        unanswered = (answers.ids[:, :-1] < 0).all(-1) & (batch["labels"][:, 1:] != IGNORE_INDEX)
        if unanswered.any():
            raise ValueError(
                f"labels: expected targets that {self.teacher.path} has answers for, got "
                f"{int(unanswered.sum())} in one batch that it has none for. It was built with "
                "positions='targets' from examples with fewer targets: build it from these, or "
                "with positions='all'"
            )
        assert answers.log_tail is not None
        return dict(zip(_COLUMNS, (answers.ids, answers.logprobs, answers.log_tail), strict=True))


def cache_lookup(teacher: Any, config: DistillConfig) -> CacheLookup | None:
    if not isinstance(teacher, TeacherCache) or config.k is None:
        return None
    return CacheLookup(teacher, config.k, config.temperature)


def answers_from_batch(batch: Mapping[str, Tensor], temperature: float) -> TopK | None:
    """What a worker put into the batch [B, T, K]."""
    if _COLUMNS[0] not in batch:
        return None
    ids, logprobs, log_tail = (batch[name] for name in _COLUMNS)
    return TopK(ids, logprobs, log_tail, temperature)


def check_cache_settings(
    teacher: TeacherCache, config: DistillConfig, processing_class: Any
) -> None:
    """What answers on disk cannot be asked."""
    if config.lmbda:
        raise ValueError(
            f"lmbda: expected 0 with a cached teacher, got {config.lmbda:g}: nobody can say in "
            "advance what the student will sample. Use the model, or a server"
        )
    if processing_class is not None:
        teacher.check_tokenizer(processing_class)
    assert config.k is not None
    teacher.check(k=config.k, temperature=config.temperature)
    if teacher.sampled and (config.divergence != "forward_kl" or config.tail == "renorm_both"):
        raise ValueError(
            f"divergence: expected 'forward_kl' (with any tail but 'renorm_both') with sampled "
            f"targets, got {config.divergence!r} with tail={config.tail!r}. Draws are right on "
            "average for what is linear in the teacher's probabilities, and for nothing else"
        )


def check_cache_covers(teacher: Any, encoder: Encoder, datasets: Mapping[str, Any]) -> None:
    """Before the first step: whether a cache was built from these examples and has answers
    at their targets, by a look at some."""
    if not isinstance(teacher, TeacherCache):
        return
    for name, dataset in datasets.items():
        for index, example in some_of(dataset):
            row = encoder(example, index)
            tokens, targets = row.ids[row.attended != 0], row.targets[row.attended != 0]
            if not teacher.has(tokens):
                raise ValueError(
                    f"{name}: expected examples that {teacher.path} was built from, got one "
                    f"(number {index}) whose tokens it does not have. The cache read them with "
                    f"max_length={teacher.manifest.settings.max_length} and completion_only_loss="
                    f"{teacher.manifest.settings.completion_only}; build one from this dataset, or "
                    "pass the dataset and the settings that it was built from"
                )
            missing = (targets[1:] != IGNORE_INDEX) & ~teacher.answered(tokens)[:-1]
            if missing.any():
                raise ValueError(
                    f"labels: expected targets that {teacher.path} has answers for, got "
                    f"{int(missing.sum())} in example {index} of {name} that it has none for (the "
                    f"first is token {int(missing.nonzero()[0]) + 1}). It was built with "
                    "positions='targets' from examples with fewer targets: build it from these, or "
                    "with positions='all'"
                )
