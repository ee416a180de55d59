"""linear_lse_gather and linear_topk: values, gradients, empty and repeated slots."""

import pytest
import torch
from torch.autograd import gradcheck

import fastdistill as fd
from helpers.cases import case, leaves
from helpers.present import present
from helpers.tolerances import GRADIENT, VALUE, assert_close

HEADS = [
    {},
    {"temperature": 2.5},
    {"softcap": 3.0, "logit_scale": 0.7, "temperature": 0.8},
    {"valid_vocab": 53},
]


def ids_with_traps(N: int, K: int, V: int) -> torch.Tensor:
    """Repeats, an empty slot, a row of nothing but empty slots."""
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(3))
    ids[:, 2] = ids[:, 0]
    ids[1, 1] = -1
    ids[4] = -1
    return ids


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", list(VALUE), ids=str)
def test_against_dense_fp64(dtype, head):
    c = case(dtype)
    ids = ids_with_traps(12, 6, 53)
    g = torch.Generator().manual_seed(9)
    up_z = torch.randn(12, 6, generator=g).masked_fill(ids < 0, 0)
    up = torch.randn(3, 12, generator=g).double()
    results = []
    for run_dtype, impl in ((dtype, "auto"), (torch.float64, "reference")):
        x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=run_dtype)
        out = fd.linear_lse_gather(x, w, ids, bias=b, with_entropy=True, impl=impl, **head)
        assert (out.logits[ids < 0] == -torch.inf).all()
        z = out.logits.masked_fill(ids < 0, 0)
        loss = (z * up_z).sum() + sum(
            (u * t).sum() for u, t in zip(up, (out.lse_rest, out.entropy, out.lse), strict=True)
        )
        loss.backward()
        results.append((z, out.lse_rest, out.entropy, out.lse, x.grad, w.grad, b.grad))
    for i, (a, t) in enumerate(zip(*results, strict=True)):
        assert_close(a, t, (VALUE if i < 4 else GRADIENT)[dtype], f"output {i}")


def test_repeated_id_leaves_the_rest_once():
    x, w = torch.randn(1, 4).double(), torch.randn(9, 4).double()
    once = fd.linear_lse_gather(x, w, torch.tensor([[3, 5, -1]]))
    twice = fd.linear_lse_gather(x, w, torch.tensor([[3, 5, 3]]))
    torch.testing.assert_close(once.lse_rest, twice.lse_rest)
    torch.testing.assert_close(once.lse, twice.lse)
    z = x @ w.t()
    torch.testing.assert_close(twice.lse, z.logsumexp(-1))
    assert twice.logits[0, 0] == twice.logits[0, 2]


def test_empty_slot_takes_no_gradient_and_hides_no_token():
    (x,) = leaves(torch.randn(2, 4).double())
    w = torch.randn(9, 4).double()
    out = fd.linear_lse_gather(x, w, torch.tensor([[-1, -1], [-1, -1]]))
    torch.testing.assert_close(out.lse_rest, (x @ w.t()).logsumexp(-1))
    out.logits.masked_fill(out.logits == -torch.inf, 0).sum().backward()
    assert (present(x.grad) == 0).all()


def test_ids_covering_the_vocabulary_leave_no_rest():
    x, w = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    ids = torch.arange(5).expand(3, 5)
    x, w = leaves(x, w)
    out = fd.linear_lse_gather(x, w, ids, with_entropy=True)
    assert (out.lse_rest == -torch.inf).all()
    (out.lse + present(out.entropy)).sum().backward()
    y, v = leaves(x, w)
    z = y @ v.t()
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(out.entropy, entropy)
    (z.logsumexp(-1) + entropy).sum().backward()
    assert_close(x.grad, y.grad, 1e-9)
    assert_close(w.grad, v.grad, 1e-9)


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head, impl_of_auto):
    interpreted = impl_of_auto == "triton" and not torch.cuda.is_available()
    if interpreted and "softcap" not in head:
        pytest.skip("seconds in Triton's interpreter; the head with every option stands in")
    torch.manual_seed(0)
    V = 12 if interpreted else 60  # each number in W costs two calls
    x, w, b = leaves(torch.randn(3, 4), torch.randn(V, 4), torch.randn(V), dtype=torch.float64)
    ids = torch.tensor([[0, 5, 0], [-1, 2, 7], [8, 1, 4]])

    def run(x, w, b):
        out = fd.linear_lse_gather(x, w, ids, bias=b, with_entropy=True, **head)
        return out.logits.masked_fill(ids < 0, 0), out.lse_rest, out.entropy, out.lse

    assert gradcheck(run, (x, w, b))


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize("dtype", list(VALUE), ids=str)
@pytest.mark.parametrize("k", [1, 7, 67])
def test_linear_topk(dtype, k):
    c = case(dtype)
    best = fd.linear_topk(c.hidden, c.weight, k, bias=c.bias, temperature=1.5)
    truth = fd.linear_topk(
        c.hidden.double(),
        c.weight.double(),
        k,
        bias=c.bias.double(),
        temperature=1.5,
        impl="reference",
    )
    assert (best.ids == truth.ids).all()
    assert best.temperature == 1.5
    assert_close(best.logprobs, truth.logprobs, VALUE[dtype])
    if k == 67:
        assert (present(best.log_tail) == -torch.inf).all()
    else:
        assert_close(best.log_tail, truth.log_tail, VALUE[dtype])


def test_topk_tail_survives_a_confident_row():
    """1 − Σ exp is rounding noise here in fp32; the tail is summed over what is left out."""
    x = torch.eye(1, 8) * 30
    w = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    w[7] = 0
    w[7, 0] = 1
    best = fd.linear_topk(x, w, 4)
    z = (x.double() @ w.double().t())[0]
    rest = z.clone()
    rest[best.ids[0]] = -torch.inf
    truth = rest.logsumexp(-1) - z.logsumexp(-1)
    assert truth < -17  # below what fp32 can tell from 1
    assert abs(present(best.log_tail).item() - truth.item()) < 1e-4


def test_padded_rows_do_not_exist():
    c = case(V=70)
    x, w = leaves(c.hidden, c.weight)
    best = fd.linear_topk(x, w, 20, valid_vocab=60)
    assert best.ids.max() < 60
    out = fd.linear_lse_gather(x, w, best.ids, valid_vocab=60)
    torch.testing.assert_close(out.lse, (x @ w[:60].t()).logsumexp(-1))
    out.lse.sum().backward()
    assert (present(w.grad)[60:] == 0).all()
    assert (present(w.grad)[:60] != 0).any()
