"""The row mathematics of every backend against autograd in fp64, and its launches."""

import pytest
import torch

import fastdistill as fd
from benchmarks.counted import on_gpu
from benchmarks.gpus import H200
from benchmarks.predict import operands
from benchmarks.shapes import Shape
from fastdistill.kernels import gpu_token_loss, topk_loss
from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.divergences import floor_of
from fastdistill.kernels.head import LMHead, Stats, slot_grads
from fastdistill.kernels.token_loss import (
    NEG,
    Gathered,
    LossOptions,
    TeacherTopK,
    entropy_of,
    merge_answers,
    slot_ids,
    token_loss_forward,
)
from helpers.counted_memory import NEED
from helpers.present import present
from helpers.tolerances import assert_close

# divergence, tail, temperature, cross-entropy and z-loss, label, entropy, K, softcap, dtype
CASES = [
    ("forward_kl", "bucket", 1.0, 0.0, False, False, 7, None, torch.float64),
    ("forward_kl", "renorm_teacher", 2.0, 0.3, True, True, 7, 30.0, torch.float64),
    ("reverse_kl", "truncate", 1.0, 0.3, True, False, 7, None, torch.float32),
    ("jsd", "bucket", 2.0, 0.3, True, True, 600, None, torch.float64),
    ("jsd", "renorm_both", 2.0, 0.3, True, True, 7, 30.0, torch.float32),
    ("tvd", "renorm_teacher", 1.0, 0.0, True, True, 7, None, torch.float64),
    ("hellinger", "bucket", 1.0, 0.3, True, False, 7, 30.0, torch.float32),
    ("hellinger", "renorm_both", 1.0, 0.3, False, True, 600, None, torch.float64),
    ("skew_forward_kl", "truncate", 2.0, 0.0, True, True, 600, 30.0, torch.float64),
    ("skew_reverse_kl", "bucket", 1.0, 0.3, True, True, 7, None, torch.float64),
    ("nla", "bucket", 2.0, 0.3, True, True, 7, 30.0, torch.float64),
    ("nla", "bucket", 1.0, 0.0, False, False, 1, None, torch.float32),
    ("nla", "renorm_both", 1.0, 0.3, True, False, 600, None, torch.float32),
    ("lk_hybrid", "bucket", 1.0, 0.3, True, True, 600, None, torch.float64),
    ("lk_hybrid", "bucket", 2.0, 0.0, True, False, 1, 30.0, torch.float32),
    ("lk_hybrid", "renorm_both", 2.0, 0.3, False, True, 7, None, torch.float64),
]


def rows_of(K, dtype, with_label, base):
    """(ids, statistics, answers, labels, coef) of six rows, one kind each."""
    g = torch.Generator().manual_seed(1)
    teacher_ids = torch.stack([torch.randperm(2 * K, generator=g)[:K] for _ in range(6)])
    teacher_ids[1, 2:4] = -1  # empty slots
    teacher_ids[2] = -1  # no answer
    lp = torch.randn(6, K, generator=g, dtype=torch.float64).log_softmax(-1) - 0.3
    lp = lp.masked_fill(teacher_ids < 0, floor_of(dtype))
    lp[0, 0] = floor_of(dtype)
    # The label: among the ids, absent (two), among them, none, another token.
    label = torch.stack([teacher_ids[0, 3 % K], *torch.tensor([2 * K, 2 * K, 0, -100, 2 * K])])
    label[3] = teacher_ids[3, K - 1]
    ids = slot_ids(teacher_ids, label if with_label else None).clone()
    z = torch.randn(ids.shape, generator=g, dtype=torch.float64)
    z = z.masked_fill(ids < 0, NEG)
    rest = torch.tensor([4.0, 1.0, 2.0, 9.0 + K**0.5, NEG, 0.0], dtype=torch.float64)
    stats = Stats(z, rest, rest.clamp(min=0.0) / 3, rest - 0.5 if base else None)
    answers = TeacherTopK(teacher_ids, lp, torch.full((6,), -1.2, dtype=torch.float64))
    return ids, stats, answers, label if with_label else None, torch.linspace(-1, 1, 6).double()


def in_type(tensors, dtype):
    return type(tensors)(
        *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[6]}")
def test_rows_against_autograd(case, impl):
    name, tail, T, ce, with_label, with_entropy, K, softcap, dtype = case
    options = LossOptions(name, 0.3, 0.2, tail, T, True, ce, 1e-2 if ce else 0.0)
    head = LMHead(torch.empty(0), None, 0.7, softcap, None, T)
    ids, stats, answers, label, coef = rows_of(K, dtype, with_label, T != 1.0)
    if options.is_combined:  # 1 − TV is α only of masses that sum to 1
        answers = answers._replace(log_tail=torch.log1p(-answers.lp.exp().sum(-1)))
    stats = stats._replace(mean_rest=stats.mean_rest if with_entropy else None)
    ids[5, 1 % K] = -1  # a slot that another rank holds
    z, rest = (t.clone().requires_grad_() for t in (stats.z_ids, stats.lse_rest))
    base = None if stats.lse_base is None else stats.lse_base.clone().requires_grad_()
    # The reference adds up the same rounded answers.
    rounded = in_type(in_type(answers, dtype), torch.float64)
    truth = token_loss_forward(Gathered(z, rest, base), rounded, label, options)
    wanted = [t for t in (z, rest, base) if t is not None]
    g_z, g_rest, *g_base = torch.autograd.grad(
        (coef * truth.per_token).sum(), wanted, allow_unused=True, materialize_grads=True
    )
    out = get_backend(impl).token_loss(
        head,
        ids,
        in_type(stats, dtype),
        in_type(answers, dtype),
        label,
        coef.to(dtype),
        options,
        grad=True,
    )
    budget = 1e-9 if dtype == torch.float64 else 2e-5
    for what, actual, expected in zip(truth._fields, out.rows, truth, strict=True):
        assert (actual is None) == (expected is None), what
        if expected is not None:
            assert_close(actual, expected, budget, what)
    if with_entropy:
        unique = stats.z_ids > NEG / 2
        lse = truth.lse
        if lse is None or T != 1.0:
            lse = torch.logaddexp(stats.lse_rest, stats.z_ids.logsumexp(-1))
        mean = present(stats.mean_rest)
        expected = entropy_of(stats.z_ids, stats.lse_rest, mean, lse, unique)
        assert_close(out.entropy, expected, budget, "entropy")
    grads = present(out.grads)
    held = stats.z_ids.masked_fill(ids < 0, NEG)
    assert_close(grads.z_ids, slot_grads(head, held, g_z), budget, "d slots")
    assert (grads.z_ids[ids < 0] == 0).all()
    assert_close(grads.lse_rest, g_rest, budget, "d lse_rest")
    assert (grads.lse_base is None) == (base is None or not ce)
    if grads.lse_base is not None:
        assert_close(grads.lse_base, g_base[0], budget, "d lse_base")


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy in Triton's interpreter
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["nla", "lk_hybrid"])
def test_a_logit_that_is_not_finite_stays_in_its_row(name, impl):
    """min(p, NaN) is not p, though α is then small enough for −log α."""
    head = LMHead(torch.empty(0), temperature=1.0)
    lp = torch.tensor([[0.4, 0.3, 0.2]] * 3).log()
    teacher = TeacherTopK(torch.arange(3).repeat(3, 1), lp, torch.full((3,), 0.1).log())
    z = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    z[1, 0], z[2, 1] = torch.nan, torch.inf
    stats = Stats(z, torch.zeros(3), None, None)
    out = get_backend(impl).token_loss(
        head, teacher.ids, stats, teacher, None, torch.ones(3), LossOptions(name), grad=True
    )
    assert out.rows.per_token.isfinite().tolist() == [True, False, False]
    assert present(out.grads).z_ids.isfinite().all(-1).tolist() == [True, False, False]


@pytest.mark.parametrize("slots", [4, 512])
def test_repeated_slots_become_one(slots, monkeypatch):
    """Also when the first slot of an id is in another tile than the others."""
    monkeypatch.setitem(gpu_token_loss.ROWS_TILE, "slots", slots)
    head = LMHead(torch.empty(0), None, 0.7, 30.0, None, 2.0)
    ids = torch.tensor([[3, 8, 3, -1, 8, 3, 5], [-1, -1, 2, 2, 2, 9, 2], [0, 1, 2, 3, 4, 5, 6]])
    z = torch.where(ids < 0, NEG, ids.double())
    z[2, 6] = NEG  # an id that no row of the head has
    g = torch.randn(3, 7, dtype=torch.float64)
    distinct, merged = gpu_token_loss.merge_slots(head, ids, z, g)
    assert distinct.tolist() == [
        [3, 8, -1, -1, -1, -1, 5],
        [-1, -1, 2, -1, -1, 9, -1],
        [0, 1, 2, 3, 4, 5, 6],
    ]

    def by_id(ids, g):
        return torch.zeros(3, 10).double().scatter_add(1, ids.clamp(min=0), g * (ids >= 0))

    assert_close(by_id(distinct, merged), by_id(ids, slot_grads(head, z, g)), 1e-12)
    assert (merged[distinct < 0] == 0).all()
    lp = g.log_softmax(-1).masked_fill(ids < 0, floor_of(g.dtype))
    for got, expected in zip(
        gpu_token_loss.merge_answers(ids, lp), merge_answers(ids, lp), strict=True
    ):
        assert_close(got, expected, 1e-14)


@pytest.mark.parametrize(
    ("divergence", "dtype", "label", "operators"),
    [
        ("forward_kl", torch.bfloat16, False, 19),
        ("jsd", torch.float16, True, 57),
        ("nla", torch.bfloat16, False, 19),
        ("lk_hybrid", torch.float16, True, 57),
    ],
)
def test_a_chunk_launches_one_kernel_for_its_rows(divergence, dtype, label, operators):
    options = LossOptions(divergence, temperature=2.0, ce_weight=0.1 if label else 0.0)
    counts = []
    for chunks in (2, 3):
        N, K = 32 * chunks, 64
        with on_gpu(H200) as calls, torch.no_grad():
            data = operands(Shape(N, 64, 4096, K), dtype)
            labels = data.labels if label else None
            t = present(data.teacher)
            teacher = TeacherTopK(t.ids, t.logprobs, present(t.log_tail))
            ids = slot_ids(teacher.ids, labels)
            head = LMHead(data.weight, temperature=2.0)
            calls.clear()
            topk_loss.fused(
                get_backend("triton"),
                head,
                data.hidden,
                ids,
                teacher,
                labels,
                torch.empty(N, device="cuda"),
                options,
                base=label,
                entropy=label,
                chunk=32,
                **NEED,
            )
        assert calls.kernels()["triton_token_loss:token_loss"] == chunks
        counts.append(calls.counts()["operators"])
    assert counts[1] - counts[0] <= operators


@pytest.mark.parametrize("w", [3.5e-53, 1 - 1e-12])
@pytest.mark.parametrize("name", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_near_its_end(name, w):
    """Its logarithm is finite although w or 1 − w is 0 in fp32."""
    g = torch.Generator().manual_seed(0)
    x, head, y, other = (torch.randn(*s, generator=g) for s in ((6, 8), (40, 8)) * 2)
    options = {"divergence": name, "beta": w, "skew": w}
    for loss in (
        lambda a, b, c, d, impl: fd.linear_distill_loss(a, b, c, d, impl=impl, **options),
        lambda a, b, c, d, impl: fd.topk_distill_loss(
            a, b, fd.linear_topk(c, d, k=5), impl=impl, **options
        ),
    ):
        xs = [x.clone().requires_grad_(), x.double().requires_grad_()]
        actual = loss(xs[0], head, y, other, "triton")
        expected = loss(xs[1], head.double(), y.double(), other.double(), "torch")
        actual.backward()
        expected.backward()
        for a, b in ((actual, expected), (xs[0].grad, xs[1].grad)):
            torch.testing.assert_close(present(a).double(), b, rtol=1e-4, atol=1e-6)
