"""Cached answers: read in the DataLoader's workers, they travel in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from ..hf.columns import TEACHER_PROMPT
from ..hf.encoder import IGNORE_INDEX, Encoder
from ..losses.types import TopK
from ..runtime import checks
from ..teachers.cache import TeacherCache
from .checks.dataset import some_of
from .config import DistillConfig
from .shared_targets import leave_out

_COLUMNS = ("teacher_ids", "teacher_logprobs", "teacher_log_tail")


@dataclass(frozen=True)
class CacheLookup:
    """Adds cached answers to a batch. Can be pickled for workers: open files are left out."""

    teacher: TeacherCache
    k: int
    temperature: float

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answers = self.teacher.topk(
            batch["input_ids"], batch["attention_mask"], k=self.k, temperature=self.temperature
        )
        assert answers.log_tail is not None
        payload = (answers.ids, answers.logprobs, answers.log_tail)
        columns = dict(zip(_COLUMNS, payload, strict=True))
        without = (answers.ids < 0).all(-1)
        left_out = leave_out(batch["labels"], without)
        if self.teacher.maps_tokens:
            return columns | left_out
        if unanswered := int(left_out["unaligned"].sum()):
            got = f"{unanswered} targets without answers in one batch"
            _fail_unanswered(self.teacher, got)
        return columns


def cache_lookup(teacher: Any, config: DistillConfig) -> CacheLookup | None:
    """Return what adds a cached teacher's answers to a batch, or None for other teachers."""
    if not isinstance(teacher, TeacherCache) or config.k is None:
        return None
    return CacheLookup(teacher, config.k, config.temperature)


def answers_from_batch(batch: Mapping[str, Tensor], temperature: float) -> TopK | None:
    """Return the answers [B, T, K] that a worker added to the batch, or None."""
    if _COLUMNS[0] not in batch:
        return None
    ids, logprobs, log_tail = (batch[name] for name in _COLUMNS)
    return TopK(ids, logprobs, log_tail, temperature)


def check_cache_settings(
    teacher: TeacherCache, config: DistillConfig, processing_class: Any
) -> None:
    """Raise ValueError for settings and tokenizers that do not fit the cached answers."""
    if config.lmbda:
        hint = "a cache has no answers for what the student will sample. Use the model or a server"
        checks.fail("lmbda", "0 with a cached teacher", f"{config.lmbda:g}", hint)
    if processing_class is not None:
        teacher.check_tokenizer(processing_class)
    assert config.k is not None
    teacher.check(k=config.k, temperature=config.temperature)
    if teacher.sampled and (config.divergence != "forward_kl" or config.tail == "renorm_both"):
        checks.fail(
            "divergence",
            "'forward_kl' (with any tail but 'renorm_both') with sampled targets",
            f"{config.divergence!r} with tail={config.tail!r}",
            "they are unbiased only for losses that are linear in the teacher's probabilities",
        )


def check_cache_covers(teacher: Any, encoder: Encoder, datasets: Mapping[str, Any]) -> None:
    """Raise ValueError if a cache lacks answers for the targets of some sampled examples."""
    if not isinstance(teacher, TeacherCache):
        return
    for name, dataset in datasets.items():
        for index, example in some_of(dataset):
            if example.get(TEACHER_PROMPT) is not None:
                hint = "its answers are for the prompts of the student"
                got = f"one in example {index} of {name}"
                checks.fail(TEACHER_PROMPT, "no such column with a cache", got, hint)
            row = encoder(example, index)
            tokens, targets = row.ids[row.attention_mask != 0], row.targets[row.attention_mask != 0]
            if not teacher.has(tokens):
                settings = teacher.manifest.settings
                checks.fail(
                    name,
                    f"examples that {teacher.path} was built from",
                    f"one (number {index}) that is not in it",
                    f"the cache was built with max_length={settings.max_length} and "
                    f"completion_only_loss={settings.completion_only}. Build a cache from this "
                    "dataset, or use the dataset and settings that it was built from",
                )
            missing = (targets[1:] != IGNORE_INDEX) & ~teacher.answered(tokens)[:-1]
            if missing.any():
                where = f"example {index} of {name}"
                first = f"the first is token {missing.int().argmax() + 1}"
                got = f"{missing.sum()} targets without answers in {where} ({first})"
                _fail_unanswered(teacher, got)


def _fail_unanswered(teacher: TeacherCache, got: str) -> NoReturn:
    checks.fail(
        "labels",
        f"targets that {teacher.path} has answers for",
        got,
        "the cache was built with positions='targets' from examples with fewer targets: rebuild it "
        "from these examples, or with positions='all'",
    )
