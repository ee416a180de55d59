"""The types that the public functions take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

TAIL_FLOOR = 2.0**-24  # 1 − Σp below this is rounding error in fp32, not mass


class TopK(NamedTuple):
    """A teacher's log-probabilities of K tokens per position, and the log of the remaining mass.

    Args:
        ids: int32 or int64 [..., K]; −1 marks an empty slot, whose logprob is ignored. In a loss,
            a repeated id is one outcome whose probability is the sum over its slots; in the answer
            of a teacher it is an error.
        logprobs: float [..., K], log p(id), normalized over the teacher's whole vocabulary at
            `temperature`.
        log_tail: float32 [...], log of the mass outside `ids` at `temperature`. None means
            log(1 − Σ exp logprobs), floored at log 2⁻²⁴ (the resolution of 1 − Σ in fp32).
        temperature: the temperature T at which softmax(logits / T) was taken.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor | None = None
    temperature: float = 1.0

    def to(self, device: torch.device | str) -> TopK:
        """Return the answers on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def at(self, index: Any) -> TopK:
        """Return the answers at an index, slice or mask of the leading dimensions."""
        return self.map(lambda tensor: tensor[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> TopK:
        """Return the answers with `change` applied to ids, logprobs and log_tail."""
        tail = None if self.log_tail is None else change(self.log_tail)
        return TopK(change(self.ids), change(self.logprobs), tail, self.temperature)

    def tail(self) -> Tensor:
        """Return the log of the mass outside `ids`, [...].

        log_tail, or if it is None log max(1 − Σ exp logprobs, 2⁻²⁴), computed in fp64
        """
        if self.log_tail is not None:
            return self.log_tail
        inside = self.logprobs.double().exp().masked_fill(self.ids < 0, 0.0).sum(-1)
        return torch.log1p(-inside.clamp(max=1 - TAIL_FLOOR))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        temperature: float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        id_dtype: torch.dtype = torch.int64,
    ) -> TopK:
        """Return empty answers: ids −1 [*shape], logprobs −inf, and all mass in the tail."""
        return cls(
            torch.full(shape, -1, dtype=id_dtype, device=device),
            torch.full(shape, -torch.inf, dtype=dtype, device=device),
            torch.zeros(shape[:-1], dtype=dtype, device=device),
            temperature,
        )

    def put(self, at: Tensor, answers: TopK) -> None:
        """Write answers [n, K] to positions `at` (n,) of the flattened leading dimensions."""
        assert self.log_tail is not None
        assert answers.log_tail is not None
        for target, answer in (
            (self.ids.flatten(0, -2), answers.ids),
            (self.logprobs.flatten(0, -2), answers.logprobs),
            (self.log_tail.flatten(), answers.log_tail),
        ):
            target.index_copy_(0, at, answer.to(target))

    def flatten(self) -> TopK:
        """Return the answers as [N, K], in the order of their positions."""
        tail = None if self.log_tail is None else self.log_tail.flatten()
        ids, logprobs = (x.reshape(-1, x.shape[-1]) for x in (self.ids, self.logprobs))
        return TopK(ids, logprobs, tail, self.temperature)

    def within(self, vocab: int) -> TopK:
        """Return the distribution given that the id is below `vocab`: p(id | id < vocab).

        Exact if all ids from `vocab` on with mass are in the answers; mass of other padding ids
        remains in the tail. Slots of ids from `vocab` on become empty.
        """
        outside = self.ids >= vocab
        if outside.device.type == "cpu" and not outside.any():  # on a GPU the host would wait
            return self
        outside_mass = self.logprobs.float().exp().masked_fill(~outside, 0.0).sum(-1, keepdim=True)
        up = torch.log1p(-outside_mass.clamp(max=1 - TAIL_FLOOR))
        tail = None if self.log_tail is None else self.log_tail - up[..., 0]
        logprobs = (self.logprobs - up).masked_fill(outside, -torch.inf)
        return TopK(self.ids.masked_fill(outside, -1), logprobs, tail, self.temperature)


class SelectedLogits(NamedTuple):
    """Logits of the K given ids and the log-sum-exp of all others (fp32; fp64 from fp64).

    logits [..., K] (−inf in empty slots), lse_rest [...] over every v ∉ ids (−inf if the ids
    cover the vocabulary), entropy [...] of the full softmax in nats or None, lse [...] over all.
    """

    logits: Tensor
    lse_rest: Tensor
    entropy: Tensor | None
    lse: Tensor


class DistillOutput(NamedTuple):
    """The loss and the statistics of the same pass; only `loss` carries a gradient.

    loss: scalar, or [...] for reduction="none" (weighted, zero at ignored positions).
    per_token [...]: the loss before token_weight and reduction; zero at ignored positions.
    divergence [...]: D(p, q) alone, without T², mixing weight or cross-entropy.
    teacher_mass [...]: Σ p over the ids. student_mass [...]: Σ q over the same ids.
    lse [...]: log-sum-exp of the logits at T=1. nll [...]: −log q(label) at T=1, or None.
    entropy [...]: H(q) in nats at the loss temperature.
    tail="renorm_both" without ce_weight and z_loss needs no pass over the LM head: student_mass,
    lse, nll and entropy are None.
    """

    loss: Tensor
    per_token: Tensor
    divergence: Tensor
    teacher_mass: Tensor
    student_mass: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


class TokenScores(NamedTuple):
    """Per-position scores of one streamed pass, fp32 [...], no gradient.

    Of softmax(logits / temperature): entropy, varentropy (variance of −log q), max_logprob,
    argmax (int64), margin (top-1 minus top-2 logprob), lse. With labels, at T=1: nll, and
    label_rank (int64, 0 = top). With a teacher, bucket tail: forward_kl, teacher_mass,
    student_mass, hellinger = √(1 − Σ√(pq)), acceptance_rate = Σ min(p, q).
    """

    lse: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_logprob: Tensor
    argmax: Tensor
    margin: Tensor
    nll: Tensor | None = None
    label_rank: Tensor | None = None
    forward_kl: Tensor | None = None
    teacher_mass: Tensor | None = None
    student_mass: Tensor | None = None
    hellinger: Tensor | None = None
    acceptance_rate: Tensor | None = None
