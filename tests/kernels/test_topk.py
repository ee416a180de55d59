"""The top k at several temperatures: one product, exact tails, and ties on both backends."""

import pytest
import torch

from fastdistill.kernels.head import LMHead
from fastdistill.losses.linear_head import topk_at
from helpers.cases import case
from helpers.counted_memory import Products
from helpers.present import present
from helpers.tolerances import VALUE, assert_close

V, TEMPERATURES = 1000, (1.0, 2.5)

# With the Triton backend, k = 5 takes the members of 5 groups and k = 500 all of them.
CASES = [
    (torch.float32, 5, {}),
    (torch.bfloat16, 5, {"valid_vocab": 961, "logit_scale": -2.0}),
    (torch.float16, 1, {"valid_vocab": 997, "softcap": 5.0, "logit_scale": -0.7}),
    (torch.float64, 5, {"softcap": 5.0}),
    (torch.bfloat16, 500, {"valid_vocab": 997, "softcap": 5.0}),
]


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize(("dtype", "k", "options"), CASES, ids=str)
def test_several_temperatures_share_one_product(impl, dtype, k, options):
    c = case(dtype, V=V, N=3)
    head = LMHead(c.weight, c.bias, **options)
    wide = LMHead(c.weight.double(), c.bias.double(), **options)
    with Products() as products:
        answers = topk_at(c.hidden, head, k, TEMPERATURES, impl)
    assert products.flops == 2 * 3 * head.vocab_size * c.hidden.shape[1]
    truths = topk_at(c.hidden.double(), wide, k, TEMPERATURES, "reference")
    for answer, truth, T in zip(answers, truths, TEMPERATURES, strict=True):
        assert (answer.ids == truth.ids).all()
        assert answer.temperature == T
        assert_close(answer.logprobs, truth.logprobs, VALUE[dtype])
        assert_close(answer.log_tail, truth.log_tail, VALUE[dtype])
        (alone,) = topk_at(c.hidden, head, k, (T,), impl)
        for a, b in zip(alone[:3], answer[:3], strict=True):
            assert torch.equal(present(a), present(b))


def test_ties_give_a_top_k_and_the_same_one_again(impl):
    """Most logits equal the k-th: any of them is right, the values and the tail are exact."""
    w = torch.randint(-1, 2, (V, 8), generator=torch.Generator().manual_seed(0)).double()
    x = torch.ones(2, 8).double()
    x[1] = 0
    z = x @ w.t()
    first, second = (topk_at(x, LMHead(w), 7, (1.0,), impl)[0] for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(z.gather(-1, first.ids), z.topk(7).values)
    assert (first.ids.sort(-1).values.diff(dim=-1) > 0).all()
    rest = z.scatter(-1, first.ids, -torch.inf).logsumexp(-1) - z.logsumexp(-1)
    assert_close(first.log_tail, rest, 1e-12)


def test_one_nan_logit_is_not_lost(impl):
    c = case(torch.float32, V=V, N=3)
    c.weight[777] = torch.nan
    (answer,) = topk_at(c.hidden, LMHead(c.weight), 5, (1.0,), impl)
    assert answer.logprobs.isnan().all()


@pytest.mark.parametrize("slabs_at_once", [2, 8])
def test_many_slabs(monkeypatch, slabs_at_once):
    """The candidates of some slabs are sorted together; what others displace is in the tail."""
    monkeypatch.setattr("fastdistill.kernels.torch_slabs.SLAB_ROWS", (16, 48))  # 21 slabs
    monkeypatch.setattr("fastdistill.kernels.torch_slabs.SLABS_AT_ONCE", slabs_at_once)
    c = case(torch.float64, V=V, N=3)
    (answer,) = topk_at(c.hidden, LMHead(c.weight), 40, (1.0,), "torch")
    (truth,) = topk_at(c.hidden, LMHead(c.weight), 40, (1.0,), "reference")
    assert (answer.ids == truth.ids).all()
    assert_close(answer.logprobs, truth.logprobs, 1e-12)
    assert_close(answer.log_tail, truth.log_tail, 1e-12)
