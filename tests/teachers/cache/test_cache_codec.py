"""What is stored is what the teacher said, to what fp16 can hold; exactly where that matters."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from fastdistill.losses.answer_checks import AnswerRules, find_invalid, find_shape_error
from fastdistill.losses.types import TopK
from fastdistill.teachers.cache.codec import Packed, bytes_per_token, pack, truncate_k, unpack
from helpers.present import present

V, K = 151_936, 64


@functools.cache
def teacher(n=64, *, vocab=V, k=K, peak=1.8, temperatures=(1.0,), seed=0):
    """Answers of fp64 logits that fall off like a language model's, at every temperature, and the
    logits."""
    g = torch.Generator().manual_seed(seed)
    z = -peak * torch.arange(1, vocab + 1).double().log() + 0.7 * torch.randn(
        n, vocab, generator=g, dtype=torch.float64
    )
    z = z[:, torch.randperm(vocab, generator=g)]
    answers = []
    ids = z.topk(k, -1).indices
    for T in temperatures:
        logp = (z / T).log_softmax(-1)
        rest = logp.scatter(-1, ids, -torch.inf).logsumexp(-1)
        answers.append(TopK(ids, logp.gather(-1, ids).float(), rest.float(), T))
    return answers, z


def stored(answers, *, vocab=V, k=K, at=0, draws=None) -> TopK:
    packed = pack(answers, k, -(-vocab // 65536))
    out = TopK.empty((len(packed.ids), k), id_dtype=torch.int32)
    unpack(packed, at, answers[0].temperature / answers[at].temperature, draws, out)
    return out


def by_id(answer):
    """Slots in order of ids, empty ones last."""
    order = torch.where(answer.ids < 0, 1 << 40, answer.ids.long()).argsort(-1)
    return answer.ids.gather(-1, order), answer.logprobs.gather(-1, order)


@pytest.mark.parametrize(
    ("vocab", "k"), [(V, 64), (V, 300), (53, 8), (65_536, 5), (65_537, 255), (262_144, 256), (9, 9)]
)
def test_ids_come_back_exactly(vocab, k):
    answers, _ = teacher(40, vocab=vocab, k=k)
    ids, logprobs = by_id(answers[0])
    decoded = stored(answers, vocab=vocab, k=k)
    assert decoded.ids.dtype == torch.int32
    assert torch.equal(decoded.ids.long(), ids)
    assert (decoded.logprobs - logprobs).abs().max() < 2e-2
    assert torch.allclose(present(decoded.log_tail), present(answers[0].log_tail), atol=1e-6)


def test_two_hundred_and_seventy_two_bytes_are_enough():
    assert bytes_per_token(K, 3, 1) == 267 <= 272
    packed = pack(teacher()[0], K, 3)
    assert sum(array.nbytes for array in packed) == 64 * 267


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("peak", [1.05, 1.8, 4.0])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_kl_of_the_stored_teacher_is_that_of_the_exact_one(peak, noise):
    """Bucket KL against students from far to converged: within 1e-3 of it, down to the 3e-7 nats
    that fp16 is away from the teacher itself."""
    answers, z = teacher(peak=peak)
    g = torch.Generator().manual_seed(1)
    student = (z + noise * torch.randn(z.shape, generator=g, dtype=torch.float64)).log_softmax(-1)
    logp = z.log_softmax(-1)

    def kl(ids, logprobs, log_tail):
        q = student.gather(-1, ids.long())
        q_tail = student.scatter(-1, ids.long(), -torch.inf).logsumexp(-1)
        inside = (logprobs.double().exp() * (logprobs.double() - q)).sum(-1)
        return (inside + log_tail.double().exp() * (log_tail.double() - q_tail)).mean().item()

    ids = answers[0].ids
    exact = kl(ids, logp.gather(-1, ids), logp.scatter(-1, ids, -torch.inf).logsumexp(-1))
    decoded = stored(answers)
    assert exact > 5e-6
    assert abs(kl(*decoded[:3]) - exact) <= max(1e-3 * exact, 3e-7)


def test_the_shift_is_what_makes_that_so():
    """Without it the mass that fp16 loses is an error of first order in a small KL."""
    answers, _ = teacher()
    decoded = stored(answers)
    total = decoded.logprobs.double().exp().sum(-1) + present(decoded.log_tail).double().exp()
    assert (total - 1).abs().max() < 1e-6
    rounded = answers[0].logprobs.half().double().exp().sum(-1) + answers[0].log_tail.double().exp()
    assert (rounded - 1).abs().max() > 1e-5


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("temperatures", [(1.0, 0.5, 4.0), (2.0, 1.0)])
def test_every_temperature_has_its_own_tail(temperatures):
    answers, z = teacher(temperatures=temperatures)
    for at, T in enumerate(temperatures):
        decoded = stored(answers, at=at)
        truth = (z / T).log_softmax(-1).gather(-1, decoded.ids.long())
        p = truth.exp()
        assert ((decoded.logprobs.double().exp() - p).abs() <= 1e-2 * p + 1e-7).all()
        assert torch.allclose(present(decoded.log_tail), present(answers[at].log_tail), atol=1e-6)
        total = decoded.logprobs.double().exp().sum(-1) + present(decoded.log_tail).double().exp()
        assert (total - 1).abs().max() < 1e-6


def test_hard_rows():
    """Certain, nearly certain, nothing known, everything in the tail, fewer slots than k."""
    ids = torch.tensor([[7, 70_000, 3], [9, 2, 1], [-1, -1, -1], [5, -1, -1], [65_535, 65_536, 0]])
    inf = torch.inf
    logprobs = torch.tensor(
        [
            [0.0, -90_000.0, -inf],
            [-1e-7, -17.0, -18.0],
            [-inf] * 3,
            [-20.0, -inf, -inf],
            [-1.0, -1.5, -2.0],
        ]
    )
    tail = torch.tensor([-inf, -16.5, 0.0, math.log1p(-math.exp(-20.0)), -1.0])
    tail[4] = torch.log1p(-logprobs[4].exp().sum())
    decoded = stored([TopK(ids, logprobs, tail)], vocab=V, k=4)
    assert decoded.ids[:, 3].eq(-1).all()
    assert decoded.ids[:, :3].sort(-1).values.tolist() == ids.sort(-1).values.tolist()
    assert not decoded.logprobs.isnan().any()
    assert decoded.logprobs[0].max() == 0.0
    assert decoded.logprobs[2].eq(-inf).all()
    assert torch.equal(present(decoded.log_tail), tail)
    total = decoded.logprobs.double().exp().sum(-1) + present(decoded.log_tail).double().exp()
    assert (total - 1).abs().max() < 2e-6


def test_without_a_tail_it_is_what_the_payload_leaves():
    logprobs = torch.tensor([[0.5, 0.25], [0.5, 0.5]]).log()
    decoded = stored([TopK(torch.tensor([[0, 1], [0, 1]]), logprobs)], vocab=2, k=2)
    assert present(decoded.log_tail).tolist() == pytest.approx([math.log(0.25), math.log(2**-24)])


def test_draws_come_back_exactly():
    counts = torch.tensor([[1, 2, 47, 0], [50, 0, 0, 0], [13, 17, 19, 1]])
    ids = torch.tensor([[4, 9, 2, -1], [8, -1, -1, -1], [1, 2, 3, 4]])
    tail = torch.full((3,), -torch.inf)
    decoded = stored([TopK(ids, (counts / 50).log(), tail)], vocab=10, k=4, draws=50)
    order = torch.where(ids < 0, 99, ids).argsort(-1)
    exact = (counts / 50).log().gather(-1, order)
    assert torch.equal(decoded.logprobs, exact)


def test_fewer_slots_put_the_rest_into_the_tail():
    answers, z = teacher()
    decoded = truncate_k(stored(answers), 5)
    best = z.log_softmax(-1).topk(5, -1)
    assert torch.equal(by_id(decoded)[0].long(), best.indices.sort(-1).values)
    total = decoded.logprobs.double().exp().sum(-1) + present(decoded.log_tail).double().exp()
    assert (total - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("ids", "logprobs", "tail", "words"),
    [
        ([[1, 2]], [[0.0, 0.0]], None, "probabilities that sum to 1 at most, got 2"),
        ([[1, 2]], [[-1.0, math.nan]], None, "NaN"),
        ([[1, 99]], [[-1.0, -2.0]], None, "ids in 0..52, or −1 for an empty slot, got 99"),
        ([[1, 1]], [[-1.0, -2.0]], None, "2 different ids, got 1 more than once"),
        ([[1, 2]], [[-1.0, -2.0]], [-0.01], "the ids and the tail to have a mass of 1, got 1.493"),
        ([[1, 2, 3]], [[-3.0, -2.0, -4.0]], None, "got 3 slots; 2 were requested"),
    ],
)
def test_what_no_model_says(ids, logprobs, tail, words):
    answer = TopK(
        torch.tensor(ids), torch.tensor(logprobs), None if tail is None else torch.tensor(tail)
    )
    error = find_shape_error(answer, (1,), 2) or find_invalid(answer, AnswerRules(vocab=53))
    assert words in str(error)


def test_nothing_at_all():
    empty = TopK.empty((0, 3))
    assert find_shape_error(empty, (0,), 3) is None
    assert find_invalid(empty, AnswerRules(vocab=53)) is None
    packed = pack([empty], 3, 1)
    assert isinstance(packed, Packed)
    unpack(packed, 0, 1.0, None, empty._replace(ids=empty.ids.int()))
    assert packed.ids.shape == (0, 3)
    assert packed.logprobs.dtype == np.float16
