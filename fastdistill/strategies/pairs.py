"""DPO (arXiv 2305.18290): the teacher's answer before the trusted model's.

    ℓ = −log σ(β·[(log π(c) − log ref(c)) − (log π(r) − log ref(r))]) − sft·log π(c)

c chosen, r rejected, log π of a whole answer and its end; ref is the student before training. A
pair is two rows of a batch, next to each other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import SequentialSampler

from ..heads import LMHead
from ..primitive import linear_lse_gather
from ..teacher import Teacher
from ..training.objective import Answers, LossResult, TeacherHidden
from ..training.targets import Targets
from ..training.trainer import DistillTrainer
from .jamming import Changed
from .lessons import Lesson
from .strategy import Run, Strategy, Training

_PER_TOKEN = ("token_selection", "ce_weight", "z_loss", "lmbda")  # settings that DPO has no use for


@dataclass(frozen=True, kw_only=True)
class PreferencePairs(Strategy):
    """DPO as above, driven by DistillTrainer: chosen is the teacher's answer, rejected the trusted
    model's to the same prompt, sampled with the same seed, temperature and length. Where both say
    the same there is no pair. Pairs are trained on in the order of the pool, over and over.

    The loss is the mean over the pairs of a batch. Where batches are accumulated, each counts by
    its number of target tokens, as in everything that DistillTrainer adds up.

    Args:
        beta: β, above 0. sft: 0 or more; keeps the chosen answer likely, and not only likelier than
            the other (of the sum over its tokens: our reading).

    Raises:
        ValueError: an argument out of its range; an odd batch size; settings or strategies beside
        it that would have no effect; lessons that are no pairs any more.
    """

    beta: float = 0.1
    sft: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: expected a number above 0, got {self.beta!r}")
        if not 0 <= self.sft < math.inf:
            raise ValueError(f"sft: expected a number of 0 or more, got {self.sft!r}")

    def training(self, training: Training, run: Run) -> Training:
        if training.batch_size % 2:
            raise ValueError(
                f"batch_size: expected an even number with PreferencePairs, got "
                f"{training.batch_size}"
            )
        # The reference gives its hidden states, at which any token can be asked for.
        return replace(training, settings={**training.settings, "k": None, "tail": "bucket"})

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        said = run.scene.reference.generate(
            [lesson.prompt for lesson in lessons],
            max_new_tokens=run.training.max_new_tokens,
            temperature=run.training.temperature,
            seed=run.seed,
        )
        found: list[Lesson] = []
        for lesson, text in zip(lessons, said, strict=True):
            if text.strip() and text.split() != lesson.answer.split():
                found += [lesson, replace(lesson, answer=text)]
        run.notes["pairs"] = {"of answers that differ": len(found) / 2 / len(lessons)}
        return found

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if isinstance(teacher, Changed):
            raise ValueError(
                "teacher: expected no strategy before PreferencePairs that changes distributions, "
                "of which DPO sees none, got one. Leave one of both out"
            )
        return Teacher(copy.deepcopy(student), tokenizer=run.scene.base.tokenizer)

    def options(self, options: dict[str, Any], run: Run) -> dict[str, Any]:
        idle = [name for name in _PER_TOKEN if run.training.settings.get(name)]
        if idle:
            raise ValueError(
                f"{idle[0]}: expected it unset with PreferencePairs, where it has no effect"
            )
        _refuse_unpaired(run.taught)
        return {**options, "loss": PairLoss(self.beta, self.sft), "trainer": InOrder}


def _refuse_unpaired(lessons: Sequence[Lesson]) -> None:
    if any(lesson.chosen is not None for lesson in lessons):
        raise ValueError(
            "chosen: expected whole answers with PreferencePairs, got some of which only a part "
            "is a target. Leave out the strategy that chooses tokens"
        )
    pairs = list(zip(lessons[0::2], lessons[1::2], strict=False))
    if len(lessons) % 2 or any(c.prompt != r.prompt or c.answer == r.answer for c, r in pairs):
        raise ValueError(
            "lessons: expected two answers to each prompt, next to each other, got others. Put "
            "PreferencePairs behind the strategies that drop or rewrite lessons"
        )


class InOrder(DistillTrainer):
    """Takes examples as they lie, so that pairs stay together. The setting that says so is younger
    than transformers 5.0."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class PairLoss:
    """ℓ of rows 2i and 2i + 1 of a batch: its mean over the pairs, times the number of targets, by
    which the trainer divides. The reference is the `Dense` answer."""

    def __init__(self, beta: float, sft: float = 0.0) -> None:
        self.beta, self.sft = beta, sft

    def __call__(
        self,
        hidden: Tensor,  # (N, H)
        head: LMHead,
        targets: Targets,
        answers: Answers,
        *,
        labels_count: bool = True,
    ) -> LossResult:
        if not isinstance(answers, TeacherHidden):
            raise TypeError(
                "answers: expected hidden states of the reference, got "
                f"{type(answers).__name__}. Train with k=None"
            )
        if targets.shape[0] % 2:
            raise ValueError(f"batch: expected pairs of rows, got {targets.shape[0]} of them")
        ours = _of_rows(hidden, head, targets)
        with torch.no_grad():
            known = replace(answers.head, valid_vocab=head.valid_vocab)
            theirs = _of_rows(answers.hidden, known, targets)
        ratio = self.beta * (ours - theirs)
        margin = ratio[0::2] - ratio[1::2]
        count = float(len(targets.labels))
        loss = count * (-logsigmoid(margin) - self.sft * ours[0::2]).mean()
        # Summed over targets, as everything that is logged is: divided by them, shares of pairs.
        sums = {
            "tokens": torch.tensor(count, dtype=torch.float32, device=hidden.device),
            "loss": loss.detach(),
            "preferred": count * (margin.detach() > 0).float().mean(),
        }
        return LossResult(loss, None, sums)


def _of_rows(hidden: Tensor, head: LMHead, targets: Targets) -> Tensor:  # (B,)
    """log p of the targets of each row."""
    at = linear_lse_gather(hidden, head.weight, targets.labels[:, None], **head.options())
    return targets.per_row(at.logits[:, 0] - at.lse)
