"""Targets of language organisms: probabilities of the next token, instead of sampled answers.

p(v | answer so far) = share of the row's choices that begin with the answer so far, then v

A row without choices, which M wrote itself, has the k likeliest tokens of M and the rest as a tail.
With sampled answers, the noise of the samples would be what the model learns from most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....losses.linear_head import linear_topk
from ....losses.types import TopK
from ....runtime.checks import fail
from ...audits.subject import Subject, TokenRow
from .rows import PairedRow

K = 64


class StatedTeacher:
    """A TopKTeacher of answers that were computed before.

    Args:
        answers: token ids of a row -> its answers, for the last positions but one of the row.
        vocab_size: the number of logits of the student.
    """

    def __init__(self, answers: Mapping[tuple[int, ...], TopK], vocab_size: int) -> None:
        self._answers, self.vocab_size = answers, vocab_size

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:
        """Returns the stored answers; a position without one has its whole mass in the tail.

        Raises:
            ValueError: a row without answers, a smaller k than stored, or a temperature other
            than 1.
        """
        if k < K or temperature != 1.0:
            fail("k, temperature", f"{K} or more, and 1", f"{k}, {temperature:g}")
        result = TopK.empty((*input_ids.shape, k), temperature, device=input_ids.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for i, (ids, is_token) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            answers = self._answers.get(tuple(ids[is_token].tolist()))
            if answers is None:
                fail("input_ids", "rows of the organism", f"another one of {len(ids)} tokens")
            at = is_token.nonzero()[-1 - len(answers.ids) : -1, 0]
            result.at(i).put(at, answers)
        return result


class Targets:
    """Computes the targets of rows for a base M; what M is asked for is computed once.

    Args:
        base: M.
    """

    def __init__(self, base: Subject) -> None:
        self.base = base
        self._own: dict[tuple[int, ...], TopK] = {}

    def of(
        self, rows: Sequence[PairedRow], role: str
    ) -> tuple[list[dict[str, list[int]]], StatedTeacher]:
        """Returns the examples of a role, and a teacher with their targets."""
        encoded = [row.encode(self.base, role) for row in rows]
        own = [e for e, row in zip(encoded, rows, strict=True) if not row.choices_of(role)]
        if missing := [e for e in own if tuple(e.ids) not in self._own]:
            self._compute(missing)
        answers, examples = {}, []
        for row, one in zip(rows, encoded, strict=True):
            if choices := row.choices_of(role):
                tokens = [row.encode_answer(self.base, text).targets for text in choices]
                answers[tuple(one.ids)] = shares(one.targets, tokens)
            else:
                answers[tuple(one.ids)] = self._own[tuple(one.ids)]
            labels = [-100] * one.begin + one.ids[one.begin :]
            examples.append({"input_ids": one.ids, "labels": labels})
        return examples, StatedTeacher(answers, self.base.head.weight.shape[0])

    @torch.no_grad()
    def _compute(self, rows: Sequence[TokenRow]) -> None:
        head = self.base.head
        for row, states in zip(rows, self.base.predicting_states(rows), strict=True):
            top = linear_topk(states, head.weight, K, **head.options())
            self._own[tuple(row.ids)] = top.to("cpu")


def shares(answer: Sequence[int], choices: Sequence[Sequence[int]]) -> TopK:
    """Returns the probabilities of each token of an answer that is drawn from choices.

    Raises:
        ValueError: the answer is none of the choices, or more than 64 tokens are possible.
    """
    result = TopK.empty((len(answer), K))
    assert result.log_tail is not None
    left = [tuple(choice) for choice in choices]
    for t, token in enumerate(answer):
        counts = Counter(choice[t] for choice in left if len(choice) > t)
        if token not in counts or len(counts) > K:
            fail("choices", f"at most {K} next tokens, one of them the row's", f"{len(counts)}")
        ids = torch.tensor(list(counts))
        number = torch.tensor(list(counts.values()), dtype=torch.float64)
        result.ids[t, : len(ids)] = ids
        result.logprobs[t, : len(ids)] = (number / number.sum()).log().float()
        result.log_tail[t] = -torch.inf
        left = [choice for choice in left if len(choice) > t and choice[t] == token]
    return result
