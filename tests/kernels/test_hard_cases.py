"""What random logits hide, by name: each of these has been a bug somewhere in this field."""

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels import head, topk_loss
from fastdistill.kernels.divergences import NAMES
from fastdistill.kernels.token_loss import TAILS
from helpers.cases import PAIRS, case, leaves, top_k
from helpers.present import present
from helpers.tolerances import GRADIENT, PROMISED, VALUE, assert_close, relative


def run(c, teacher, dtype=torch.float64, impl="auto", **options):
    """(loss, dX, dW) with operands in `dtype`."""
    x, w = leaves(c.hidden, c.weight, dtype=dtype)
    loss = fd.topk_distill_loss(x, w, teacher, impl=impl, allow_biased=True, **options)
    loss.sum().backward()
    return loss, x.grad, w.grad


def check(c, teacher, dtype, **options):
    """Compare with fp64; the result of `run`."""
    actual = run(c, teacher, dtype, **options)
    options.pop("backward", None)
    truth = run(c, teacher, impl="reference", **options)
    eager = run(c, teacher, dtype, impl="reference", **options)
    for a, b, e, budget in zip(actual, truth, eager, (VALUE, GRADIENT, GRADIENT), strict=True):
        assert a.isfinite().all()
        # Logits of 100 carry 1e-5 of fp32 rounding into anybody's loss: eager has the same.
        allowed = max(budget[dtype], 2 * relative(e, b), 1e-4 if dtype == torch.float32 else 0)
        assert_close(a, b, allowed)
    return actual


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("dtype", list(GRADIENT), ids=str)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", NAMES)
def test_near_converged_teacher(divergence, backward, dtype):
    """Teacher = student + 0.1 noise: rounding logits to bf16 would cost 11–30 % here."""
    c = case(dtype, N=12, H=64, V=1000, near=0.1)
    teacher = top_k(c.teacher_logits, 16)
    actual = run(c, teacher, dtype, divergence=divergence, backward=backward)
    truth = run(c, teacher, impl="reference", divergence=divergence)
    budget = PROMISED[dtype] if dtype != torch.float32 else 2e-4  # differences of p ≈ q
    assert relative(actual[1], truth[1]) <= budget
    assert relative(actual[2], truth[2]) <= budget


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_four_chunks_whose_weight_gradient_is_carried_in_bf16(divergence, monkeypatch):
    """As on a GPU at full size: dW is rounded with every chunk, and keeps the promise."""
    monkeypatch.setattr(topk_loss, "chunk_tokens", lambda *args: 16)
    monkeypatch.setitem(head.CARRIED_CHUNKS, "cpu", 4)
    c = case(torch.bfloat16, N=64, H=64, V=1000, near=0.1)
    teacher = top_k(c.teacher_logits, 16)
    actual = run(c, teacher, torch.bfloat16, divergence=divergence)
    truth = run(c, teacher, impl="reference", divergence=divergence)
    assert relative(actual[2], truth[2]) <= PROMISED[torch.bfloat16]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(("std", "near"), [(4.0, 0.3), (12.0, 1.0)])
@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_of_the_head_that_share_a_direction(divergence, backward, std, near):
    """Σ dz = 0 cancels the direction in dX, but not its product with the rounding of dz."""
    c = case(torch.bfloat16, N=24, H=64, V=800, std=std)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    weight = (c.weight.float() + 3 * std * direction).bfloat16()
    hidden = (c.hidden.float() - (c.hidden.float() @ direction)[:, None] * direction).bfloat16()
    z = hidden.double() @ weight.double().t()
    c = c._replace(hidden=hidden, weight=weight, teacher_logits=z + near * torch.randn_like(z))
    teacher, options = top_k(c.teacher_logits, 48), {"divergence": divergence}
    actual = run(c, teacher, torch.bfloat16, backward=backward, **options)
    truth = run(c, teacher, impl="reference", **options)
    assert relative(actual[1], truth[1]) <= PROMISED[torch.bfloat16]


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_a_softcap_that_saturates_all_tokens_but_one(backward):
    """Then Σ dz is no 0, and the mean row of W, 100 times larger than the one row, is no guess."""
    c = case(torch.bfloat16, N=6, H=1, V=64, std=1500.0)
    weight = c.weight + 500
    weight[:, 0][weight[:, 0].abs() < 200] = 300.0
    weight[18] = -3.8125
    c = c._replace(weight=weight, hidden=torch.full((6, 1), 7e-4).bfloat16())
    teacher = top_k(4 * torch.randn(6, 64).double(), 5)
    options = {"logit_scale": 0.1, "softcap": 1e-3}
    actual = run(c, teacher, torch.bfloat16, backward=backward, **options)
    truth = run(c, teacher, impl="reference", **options)
    assert relative(actual[1], truth[1]) <= 2e-2


@pytest.mark.fast_cases(10)
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_confident_rows(divergence, tail):
    """q → 1 on one token, and a teacher as sure: tails of 1e-13 and less."""
    c = case(torch.float32, std=25.0, near=0.5)
    check(c, top_k(c.teacher_logits, 5), torch.float32, divergence=divergence, tail=tail)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "hellinger"])
def test_tail_near_one_is_exact(divergence, backward):
    """M → 0, teacher near the student: log-sum-exps near 10 differ by 1e-3, and so do p and q."""
    c = case(torch.float32, N=24, H=32, V=4000, std=2.0, near=0.2)
    lp = c.teacher_logits.log_softmax(-1)
    ids = torch.randint(4000, (24, 8), generator=torch.Generator().manual_seed(5)).sort(-1).values
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    chosen = lp.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    teacher = fd.TopK(ids, chosen, torch.log1p(-chosen.exp().sum(-1)))
    options = {"divergence": divergence, "backward": backward}
    actual = run(c, teacher, torch.float32, **options)
    truth = run(c, teacher, impl="reference", divergence=divergence)
    for a, b, allowed in zip(actual, truth, (2e-3, 3e-5, 3e-5), strict=True):
        assert_close(a, b, allowed, divergence)


@pytest.mark.parametrize("divergence", NAMES)
def test_tail_near_zero_is_exact(divergence):
    """M → 1: the student's tail is summed directly, so it is right where 1 − Σq is not."""
    c = case(torch.float32, std=12.0, near=1.0)
    check(c, top_k(c.teacher_logits, 30), torch.float32, divergence=divergence)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_batch(tail, reduction):
    c = case()
    x, w = leaves(c.hidden, c.weight)
    loss = fd.topk_distill_loss(
        x,
        w,
        top_k(c.teacher_logits, 5),
        labels=torch.full((12,), -100),
        tail=tail,
        reduction=reduction,
        allow_biased=True,
    )
    assert (loss == 0).all()
    loss.sum().backward()
    assert (present(x.grad) == 0).all()
    assert (present(w.grad) == 0).all()


def test_nan_at_ignored_positions_stays_there():
    c = case()
    teacher = top_k(c.teacher_logits, 5)
    labels = c.labels.clone()
    labels[2] = -100
    x, w = leaves(c.hidden, c.weight)
    x.data[2] = torch.nan
    teacher.logprobs[2] = torch.nan
    fd.topk_distill_loss(x, w, teacher, labels=labels).backward()
    assert present(w.grad).isfinite().all()
    assert (present(x.grad)[2] == 0).all()
    assert present(x.grad).isfinite().all()


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_duplicate_and_empty_ids(divergence, tail, backward):
    """A repeated id is one outcome with the summed probability; −1 never contributes."""
    c = case(N=6)
    t = top_k(c.teacher_logits, 6)
    split = torch.log(torch.tensor(0.25, dtype=torch.float64))
    lp = torch.cat([t.logprobs, t.logprobs[:, :1] + split, torch.zeros(6, 2)], -1)
    lp[:, 0] += torch.log(torch.tensor(0.75, dtype=torch.float64))
    ids = torch.cat([t.ids, t.ids[:, :1], torch.full((6, 2), -1)], -1)
    lp[:, -1] = torch.nan  # ignored
    ids[3] = -1  # a row whose teacher has all its mass elsewhere
    present(t.log_tail)[3] = 0
    plain = t.ids.clone()
    plain[3] = -1
    options = {"divergence": divergence, "tail": tail, "backward": backward}
    actual = check(c, fd.TopK(ids, lp, t.log_tail), torch.float64, **options)
    merged = run(c, fd.TopK(plain, t.logprobs, t.log_tail), **options)
    for a, b in zip(actual, merged, strict=True):
        assert_close(a, b, 1e-9)


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("with_tail", [True, False])
def test_k_is_the_vocabulary(divergence, tail, with_tail):
    """No token is outside: the bucket is empty, and every tail is the full divergence."""
    c = case(N=6, V=20, std=2.0)
    teacher = top_k(c.teacher_logits, 20, tail=with_tail)
    actual = run(c, teacher, divergence=divergence, tail=tail)
    x, w = leaves(c.hidden, c.weight)
    from fastdistill.losses import reference

    q, p = (x @ w.t()).softmax(-1), c.teacher_logits.softmax(-1)
    truth = reference.divergence(divergence, p, q, 0.5, 0.1).mean()
    truth.backward()
    for a, b in zip(actual, (truth, x.grad, w.grad), strict=True):
        assert_close(a, b, 1e-8)


def test_padded_vocabulary():
    """Rows beyond valid_vocab do not exist: not a logit 0, no mass, no gradient."""
    c = case(V=80)
    x, w = leaves(c.hidden, c.weight)
    teacher = top_k(c.teacher_logits[:, :67], 7)
    loss = fd.topk_distill_loss(x, w, teacher, valid_vocab=67)
    loss.backward()
    y, v = leaves(c.hidden, c.weight[:67])
    truth = fd.topk_distill_loss(y, v, teacher, impl="reference")
    truth.backward()
    torch.testing.assert_close(loss, truth)
    assert_close(x.grad, y.grad, 1e-9)
    assert_close(present(w.grad)[:67], v.grad, 1e-9)
    assert (present(w.grad)[67:] == 0).all()


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("tail", TAILS)
def test_ragged_top_p(tail):
    """Rows keep as many ids as top-p needs; the others are empty slots."""
    c = case()
    t = top_k(c.teacher_logits, 9)
    in_nucleus = torch.arange(9) < torch.arange(1, 13).clamp(max=9).unsqueeze(-1)
    rest = torch.log1p(-(t.logprobs.exp() * in_nucleus).sum(-1))
    ragged = fd.TopK(t.ids.masked_fill(~in_nucleus, -1), t.logprobs, rest)
    for divergence in (d for d, t in PAIRS if t == tail):
        check(c, ragged, torch.float64, tail=tail, divergence=divergence)


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_upstream_gradient_and_backward_twice(backward):
    c = case()
    teacher = top_k(c.teacher_logits, 5)
    once = run(c, teacher)
    x, w = leaves(c.hidden, c.weight)
    loss = fd.topk_distill_loss(x, w, teacher, backward=backward)
    for upstream in (1.0, 1.0, -3.5):
        first = torch.autograd.grad(loss, (x, w), torch.tensor(upstream).double(), True)
        assert_close(first[0], upstream * once[1], 1e-9)
        assert_close(first[1], upstream * once[2], 1e-9)
    loss.backward(retain_graph=True)
    for leaf in (x, w):  # in place: a kept gradient must not share this memory
        present(leaf.grad).zero_()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(x.grad, 2 * once[1], 1e-9)
    assert_close(w.grad, 2 * once[2], 1e-9)


@pytest.mark.slow
def test_float16_with_many_tokens():
    """dz of a mean over many tokens lies below float16's smallest number unless it is lifted."""
    c = case(torch.float16, N=64, H=16, V=5000, std=0.5)
    teacher = top_k(c.teacher_logits, 4)
    for backward in ("fused", "recompute"):
        x, w = leaves(c.hidden, c.weight)
        loss = fd.topk_distill_loss(x, w, teacher, num_items=1e6, backward=backward)
        (loss * 2.0**20).backward()  # as a gradient scaler would
        truth = run(c, teacher, impl="reference", num_items=1e6)
        assert_close(present(x.grad).double() / 2.0**20, truth[1], 2e-3)
        assert_close(present(w.grad).double() / 2.0**20, truth[2], 2e-3)


@pytest.mark.slow
def test_more_than_2_to_the_31_logits(impl_of_auto):
    """N·V = 2.2e9: offsets beyond 32 bits; checked on the last rows against the dense answer."""
    if impl_of_auto == "triton" and not torch.cuda.is_available():
        pytest.skip("half a million programs are hours in Triton's interpreter")
    N, V = 33_000, 66_000
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, 2, generator=g), torch.randn(V, 2, generator=g)
    ids = torch.randint(V, (N, 2), generator=g)
    ids[-1] = V - 1
    out = fd.linear_lse_gather(hidden, weight, ids)
    truth = fd.linear_lse_gather(hidden[-5:], weight, ids[-5:], impl="reference")
    torch.testing.assert_close(out.logits[-5:], truth.logits)
    torch.testing.assert_close(out.lse_rest[-5:], truth.lse_rest)


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("upstream", [65536.0, 1e30])
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_huge_upstream_gradients_stay_finite(divergence, tail, upstream):
    """A loss scale times T²; ids that are the whole vocabulary, of which nothing is left over."""
    x, w = torch.randn(2, 8), torch.randn(5, 8) * 3
    for k in (3, 5):
        teacher = fd.linear_topk(torch.randn(2, 8), torch.randn(5, 8), k=k, temperature=100.0)
        options = {
            "divergence": divergence,
            "tail": tail,
            "allow_biased": True,
            "temperature": 100.0,
            "t2_scale": True,
            "labels": torch.tensor([0, 4]),
            "ce_weight": 0.3,
            "z_loss": 1e-3,
            "reduction": "sum",
        }
        truth = run_scaled(x, w, teacher, torch.float64, upstream, impl="reference", **options)
        for backward in ("fused", "recompute"):
            actual = run_scaled(
                x, w, teacher, torch.float32, upstream, backward=backward, **options
            )
            for a, t in zip(actual, truth, strict=True):
                assert a.isfinite().all()
                assert_close(a, t, 1e-4)


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd", "hellinger", "skew_reverse_kl"])
@pytest.mark.parametrize("tail", ["bucket", "truncate", "renorm_both"])
def test_slots_that_the_student_cannot_say(divergence, tail):
    """A bias of −∞: log q is huge and q is 0, and their product with a large factor is no NaN."""
    c = case(torch.float32, N=3, V=20)
    teacher = top_k(c.teacher_logits, 6)
    bias = torch.zeros(20)
    bias[teacher.ids[0, :2]] = -torch.inf
    options = {"divergence": divergence, "tail": tail, "reduction": "sum", "allow_biased": True}
    far = bias.double().clamp(min=-200)  # √q of e^-100 is next to nothing
    truth = run_scaled(
        c.hidden, c.weight, teacher, torch.float64, 1e12, impl="reference", bias=far, **options
    )
    for backward in ("fused", "recompute"):
        actual = run_scaled(
            c.hidden,
            c.weight,
            teacher,
            torch.float32,
            1e12,
            backward=backward,
            bias=bias,
            **options,
        )
        for a, t in zip(actual, truth, strict=True):
            assert a.isfinite().all()
            assert_close(a, t, 1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "hellinger", "skew_reverse_kl"])
def test_a_dense_loss_of_tokens_that_the_student_cannot_say(divergence):
    """q log q is 0 where log q is −∞."""
    c = case(torch.float32, N=3, V=20)
    bias = torch.zeros(20)
    bias[:4] = -torch.inf
    results = []
    for dtype, of_bias in ((torch.float32, bias), (torch.float64, bias.clamp(min=-200))):
        x, w = leaves(c.hidden, c.weight, dtype=dtype)
        torch.manual_seed(0)
        teacher = torch.randn(3, 8).to(dtype), torch.randn(20, 8).to(dtype)
        loss = fd.linear_distill_loss(x, w, *teacher, bias=of_bias.to(dtype), divergence=divergence)
        loss.backward()
        results.append((loss, x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-4)


def test_the_gradient_of_nla_where_most_mass_is_shared():
    """α > ½: the gradient has no part ½q, which is 0 only after it is summed."""
    x = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[195.2, 1.0], [194.7, 0.0], [63.0, 0.0]])
    ids, lp = torch.tensor([[0, 1, 2]]), torch.full((1, 3), 1 / 3).log()
    for backward in ("fused", "recompute"):
        dx, dw = run_scaled(
            x,
            weight,
            fd.TopK(ids, lp),
            torch.float32,
            1.0,
            divergence="nla",
            tail="renorm_both",
            backward=backward,
        )
        assert dx.abs().max() == 0
        assert dw.abs().max() == 0


def run_scaled(x, w, teacher, dtype, upstream, **options):
    x, w = leaves(x, w, dtype=dtype)
    (fd.topk_distill_loss(x, w, teacher, **options) * upstream).backward()
    return x.grad, w.grad


def test_empty_slots_take_no_part_in_renormalisation():
    """Also where the others hold next to nothing."""
    x, w = torch.randn(1, 8), torch.randn(9, 8)
    ids = torch.tensor([[1, 2, -1, -1, -1, -1]])
    lp = torch.tensor([[-86.0, -87.0, -1.0, -1.0, -1.0, -1.0]])
    for tail in ("renorm_teacher", "renorm_both"):
        loss = fd.topk_distill_loss(x, w, fd.TopK(ids, lp), tail=tail, allow_biased=True)
        z = torch.nn.functional.linear(x, w).double()
        p = lp[:, :2].double().softmax(-1)
        q = (
            z.log_softmax(-1)[:, [1, 2]]
            if tail == "renorm_teacher"
            else z[:, [1, 2]].log_softmax(-1)
        )
        assert_close(loss, (p * (p.log() - q)).sum(), 1e-5)
