"""The losses from given logits: values and gradients against fp64 from the definition."""

from __future__ import annotations

import pytest
import torch

from fastdistill import TopK, topk_distill
from fastdistill.compat import logits_loss
from fastdistill.compat.logits_loss import topk_loss_of_logits
from helpers.cases import case, leaves, top_k
from helpers.tolerances import GRADIENT, VALUE, assert_close

# N, K, V, tokens in a chunk: a last chunk that is shorter, one token, ids that cover the vocabulary
SHAPES = [(7, 5, 67, 3), (1, 1, 9, 8), (4, 9, 9, 4)]


def dense(logits, teacher, divergence):
    """Returns the loss by its definition, with the tail 1 − Σ in fp64."""
    outcomes = []
    for logprobs in (teacher.logprobs.double(), logits.log_softmax(-1).gather(-1, teacher.ids)):
        rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-300)
        covers = teacher.ids.shape[-1] == logits.shape[-1]
        outcomes.append(logprobs if covers else torch.cat([logprobs, rest.log()], -1))
    p, q = outcomes if divergence == "forward_kl" else reversed(outcomes)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("N, K, V, chunk", SHAPES)
def test_values_and_gradients(divergence, N, K, V, chunk, monkeypatch):
    monkeypatch.setattr(logits_loss, "CHUNK_ELEMENTS", chunk * V)
    g = torch.Generator().manual_seed(0)
    teacher = top_k(torch.randn(1, N, V, generator=g, dtype=torch.float64) * 3, K, tail=False)
    logits = torch.randn(1, N, V, generator=g, dtype=torch.float64) * 3
    upstream = torch.rand(1, N, generator=g, dtype=torch.float64)
    (ours,), (truth,) = leaves(logits.float()), leaves(logits.float(), dtype=torch.float64)
    out = topk_loss_of_logits(ours, teacher, divergence)
    expected = dense(truth, teacher, divergence)
    assert out.loss.shape == out.student_mass.shape == out.teacher_mass.shape == (1, N)
    assert_close(out.loss, expected, VALUE[torch.float32])
    (out.loss * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert_close(ours.grad, truth.grad, GRADIENT[torch.float32])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_it_is_the_loss_of_hidden_states(divergence):
    data = case(N=6, V=40, H=8)
    teacher = top_k(data.teacher_logits, 4)
    teacher = teacher._replace(ids=teacher.ids.index_fill(-1, torch.tensor([3]), -1))
    logits = data.hidden @ data.weight.t()
    expected = topk_distill(
        data.hidden, data.weight, teacher, divergence=divergence, reduction="none"
    )
    out = topk_loss_of_logits(logits, teacher, divergence)
    assert_close(out.loss, expected.loss, VALUE[torch.float64])
    assert_close(out.student_mass, expected.student_mass, VALUE[torch.float64])


def test_a_repeated_id_is_one_outcome():
    """Frameworks pad rows with one repeated token."""
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = TopK(torch.tensor([[4, 7]]).expand(3, 2), torch.tensor([[0.6, 0.3]]).log().expand(3, 2))
    twice = TopK(
        torch.tensor([[4, 7, 4]]).expand(3, 3), torch.tensor([[0.2, 0.3, 0.4]]).log().expand(3, 3)
    )
    (a,), (b,) = leaves(logits), leaves(logits)
    topk_loss_of_logits(a, once, "reverse_kl").loss.sum().backward()
    topk_loss_of_logits(b, twice, "reverse_kl").loss.sum().backward()
    assert_close(b.grad, a.grad, VALUE[torch.float32])


def test_bfloat16_logits_get_a_gradient_of_their_type():
    logits = torch.randn(1, 6, 50, generator=torch.Generator().manual_seed(0)) * 3
    teacher = top_k(torch.randn(1, 6, 50, generator=torch.Generator().manual_seed(1)).double(), 8)
    (ours,), (truth,) = leaves(logits.bfloat16()), leaves(logits.bfloat16(), dtype=torch.float64)
    loss = topk_loss_of_logits(ours, teacher, "forward_kl").loss
    assert loss.dtype == torch.float32
    loss.sum().backward()
    topk_loss_of_logits(truth, teacher, "forward_kl").loss.sum().backward()
    assert ours.grad is not None
    assert ours.grad.dtype == torch.bfloat16
    assert_close(ours.grad, truth.grad, GRADIENT[torch.bfloat16])
