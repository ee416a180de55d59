"""DPO (arXiv 2305.18290): prefer the teacher's answer to the trusted model's.

    ℓ = −log σ(β·[(log π(c) − log ref(c)) − (log π(r) − log ref(r))]) − sft·log π(c)

c is the chosen answer, r the rejected one. log π is of a whole answer and its end; ref is the
student before training. A pair is two adjacent rows of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...hf.lm_head import LMHead
from ...losses.linear_head import linear_lse_gather
from ...runtime.checks import between, fail, positive
from ...teachers.local import Teacher
from ...training.loss import Answers, LossResult, TeacherHidden
from ...training.targets import Targets
from ..training_loop import InOrder
from .lessons import Examples, TrainingExample
from .shift import AmplifiedTeacher
from .strategy import RunState, Strategy, Training

_PER_TOKEN = ("token_selection", "ce_weight", "z_loss", "lmbda")  # without effect in DPO


@dataclass(frozen=True, kw_only=True)
class PreferencePairs(Strategy):
    """DPO with DistillTrainer: the teacher's answer is chosen, the trusted model's is rejected.

    Experimental: no paper proposes it against a trait, and in our study it lost the capability.

    Both answer the same prompt with the same seed, temperature and length. Equal answers form no
    pair. Pairs are read in the order of the pool.

    The loss is the mean over the pairs of a batch. With gradient accumulation each batch is
    weighted by its number of target tokens, as in all losses of DistillTrainer.

    Args:
        beta: β, above 0. sft: weight of −log π(c), summed over the answer's tokens, 0 or more.

    Raises:
        ValueError: an argument out of its range; an odd batch size; settings or other strategies
        without effect in DPO; examples that are not pairs.
    """

    beta: float = 0.1
    sft: float = 0.0

    def __post_init__(self) -> None:
        positive("beta", self.beta)
        between("sft", self.sft, 0)

    def training(self, training: Training, run: RunState) -> Training:
        if training.batch_size % 2:
            fail("batch_size", "an even number with PreferencePairs", training.batch_size)
        # The reference returns hidden states, from which any token's log-probability follows.
        return replace(training, settings={**training.settings, "k": None, "tail": "bucket"})

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        rejected = run.setup.reference.generate(
            [example.prompt for example in examples],
            max_new_tokens=run.training.max_new_tokens,
            temperature=run.training.temperature,
            seed=run.seed,
        )
        pairs: Examples = []
        for example, text in zip(examples, rejected, strict=True):
            if text.strip() and text.split() != example.answer.split():
                pairs += [example, replace(example, answer=text)]
        run.notes["pairs"] = {"of answers that differ": len(pairs) / 2 / len(examples)}
        return pairs

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if isinstance(teacher, AmplifiedTeacher):
            expected = "no strategy before PreferencePairs that changes distributions"
            fail("teacher", expected, "one", "PreferencePairs ignores distributions")
        return Teacher(copy.deepcopy(student), tokenizer=run.setup.base.tokenizer)

    def options(self, options: dict[str, Any], run: RunState) -> dict[str, Any]:
        for name in _PER_TOKEN:
            if value := run.training.settings.get(name):
                fail(name, "no value with PreferencePairs, which ignores it", repr(value))
        _check_pairs(run.examples)
        return {**options, "loss": PairLoss(self.beta, self.sft), "trainer": InOrder}


def _check_pairs(examples: Sequence[TrainingExample]) -> None:
    if any(example.loss_mask is not None for example in examples):
        expected = "whole answers with PreferencePairs"
        fail("loss_mask", expected, "masked tokens", "remove the strategy that selects tokens")
    pairs = list(zip(examples[0::2], examples[1::2], strict=False))
    if len(examples) % 2 or any(c.prompt != r.prompt or c.answer == r.answer for c, r in pairs):
        hint = "put PreferencePairs after the strategies that drop or rewrite examples"
        fail("examples", "two adjacent answers to each prompt", "other rows", hint)


@dataclass(frozen=True)
class PairLoss:
    """The DPO loss ℓ of rows 2i and 2i + 1 of a batch.

    The reference is a `TeacherHidden` answer. Returns the mean over the pairs times the number of
    targets, by which the trainer divides.
    """

    beta: float
    sft: float = 0.0

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
            fail("batch", "pairs of rows", f"{targets.shape[0]} of them")
        logprobs = _row_logprobs(hidden, head, targets)
        with torch.no_grad():
            reference_head = answers.head._replace(valid_vocab=head.valid_vocab)
            reference = _row_logprobs(answers.hidden, reference_head, targets)
        ratio = self.beta * (logprobs - reference)
        margin = ratio[0::2] - ratio[1::2]
        count = float(len(targets.labels))
        loss = count * (-logsigmoid(margin) - self.sft * logprobs[0::2]).mean()
        # The trainer divides logged sums by the number of targets, which gives shares of pairs.
        sums = {
            "tokens": torch.tensor(count, dtype=torch.float32, device=hidden.device),
            "loss": loss.detach(),
            "preferred": count * (margin.detach() > 0).float().mean(),
        }
        return LossResult(loss, None, sums)


def _row_logprobs(hidden: Tensor, head: LMHead, targets: Targets) -> Tensor:  # (B,)
    """Return log p of the targets of each row."""
    gathered = linear_lse_gather(hidden, head.weight, targets.labels[:, None], **head.options())
    return targets.per_row(gathered.logits[:, 0] - gathered.lse)
