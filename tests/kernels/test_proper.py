"""Where the loss of every pair of divergence and tail is smallest, looked for numerically.

The head is the identity, so that hidden states are logits; the teacher is known on K of V tokens.
"""

from __future__ import annotations

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels.divergences import COMBINED, SEPARABLE, minimum_of
from fastdistill.kernels.token_loss import TAILS

V, K = 12, 4
VARIANTS = [
    *[(name, 0.5, 0.1) for name in (*SEPARABLE, *COMBINED)],
    *[("jsd", beta, 0.1) for beta in (0.0, 0.1, 0.9, 1.0)],
    *[(f"skew_{way}_kl", 0.5, skew) for way in ("forward", "reverse") for skew in (0.0, 0.5, 0.9)],
]
CASES = [(name, beta, skew, tail) for name, beta, skew in VARIANTS for tail in TAILS]
PROPER = [c for c in CASES if minimum_of(*c) == "teacher"]
BIASED = [c for c in CASES if minimum_of(*c) == "renormalized teacher"]
REFUSED = [c for c in CASES if minimum_of(*c) is None]


def teacher_logits():
    return torch.randn(6, V, dtype=torch.float64) * 1.5


def losses(z, teacher, pair, impl="torch"):
    name, beta, skew, tail = pair
    return fd.topk_distill_loss(
        z,
        torch.eye(V, dtype=z.dtype),
        teacher,
        divergence=name,
        beta=beta,
        skew=skew,
        tail=tail,
        reduction="none",
        impl=impl,
        allow_biased=True,
    )


def other_students(z):
    """Logits near z and far from it, with more and with less mass on each token."""
    for size in (1e-3, 0.03, 0.3, 1.0, 4.0):
        for _ in range(40):
            yield z + size * torch.randn_like(z)


def test_every_kind_of_pair_is_here():
    assert len(PROPER) + len(BIASED) + len(REFUSED) == len(CASES)
    assert {tail for *_, tail in PROPER} == {"bucket", "truncate", "renorm_both"}
    assert {(name, tail) for name, *_, tail in REFUSED} == {
        *((name, "renorm_teacher") for name in ("reverse_kl", "jsd", "skew_reverse_kl")),
        *((name, tail) for name in COMBINED for tail in ("truncate", "renorm_teacher")),
    }


@pytest.mark.fast_cases(10)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("pair", PROPER, ids=str)
def test_a_proper_loss_is_smallest_at_the_teacher(pair, impl):
    z = teacher_logits()
    teacher = fd.linear_topk(z, torch.eye(V, dtype=z.dtype), k=K)
    at_teacher = losses(z, teacher, pair, impl=impl)
    assert at_teacher.abs().max() < 1e-12
    for other in other_students(z):
        assert (losses(other, teacher, pair, impl=impl) >= at_teacher - 1e-12).all()
    if pair[0] not in ("tvd", *COMBINED):  # they have a corner there
        leaf = z.clone().requires_grad_()
        losses(leaf, teacher, pair, impl=impl).sum().backward()
        assert leaf.grad.abs().max() < 1e-12


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("pair", PROPER, ids=str)
def test_a_student_that_is_the_teacher_stays_it(pair):
    """With an optimizer that takes steps of one size, whatever the gradient."""
    z = teacher_logits()
    teacher = fd.linear_topk(z, torch.eye(V, dtype=z.dtype), k=K)
    student = (z + 0.05 * torch.randn_like(z)).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.01)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        optimizer.zero_grad()
        loss = losses(student, teacher, pair).mean()
        assert loss > -1e-12
        loss.backward()
        optimizer.step()
    p, q = (t.softmax(-1).gather(-1, teacher.ids) for t in (z, student.detach()))
    if pair[-1] == "renorm_both":
        p, q = (t / t.sum(-1, keepdim=True) for t in (p, q))
    assert (p - q).abs().max() < 0.02


@pytest.mark.parametrize("pair", BIASED, ids=str)
def test_a_biased_loss_is_smallest_at_the_renormalized_teacher(pair):
    z = teacher_logits()
    teacher = fd.linear_topk(z, torch.eye(V, dtype=z.dtype), k=K)
    renormalized = torch.full_like(z, -80.0).scatter(-1, teacher.ids, teacher.logprobs)
    least = losses(renormalized, teacher, pair)
    for other in other_students(z):
        assert (losses(other, teacher, pair) >= least - 1e-12).all()
    difference = losses(z, teacher, pair) - least
    assert (difference > -1e-12).all()
    assert (difference > 1e-3).any()


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_a_pair_without_minimum_is_refused_wherever_it_is_chosen(pair, tmp_path):
    name, beta, skew, tail = pair
    z = teacher_logits()
    eye = torch.eye(V, dtype=z.dtype)
    teacher = fd.linear_topk(z, eye, k=K)
    options = {"divergence": name, "beta": beta, "skew": skew, "tail": tail}
    calls = [
        lambda: fd.topk_distill_loss(z, eye, teacher, **options),
        lambda: fd.topk_distill_loss(z, eye, teacher, **options, allow_biased=True),
        lambda: fd.topk_distill_loss(z, eye, teacher, impl="reference", **options),
        lambda: fd.topk_distill(z, eye, teacher, **options),
        lambda: fd.TopKDistillLoss(**options),
        lambda: fd.TopKDistillLoss()(z, eye, teacher, **options),
        lambda: fd.DistillConfig(str(tmp_path), **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"tail: expected 'bucket' or .*Use tail='bucket'$"):
            call()


def test_modules_refuse_at_construction():
    with pytest.raises(ValueError, match="beta: expected"):
        fd.TopKDistillLoss(beta=2.0)
    with pytest.raises(ValueError, match="divergence: expected"):
        fd.LinearDistillLoss(divergence="kl")


def test_a_biased_pair_is_refused_without_an_explicit_choice(tmp_path):
    """At every place where a caller of the package names a divergence and a tail."""
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)
    teacher = fd.linear_topk(z, eye, k=K)
    calls = [
        lambda **o: fd.topk_distill_loss(z, eye, teacher, **o),
        lambda **o: fd.topk_distill(z, eye, teacher, **o),
        lambda **o: fd.TopKDistillLoss(**o),
        lambda **o: fd.TopKDistillLoss()(z, eye, teacher, **o),
        lambda **o: fd.DistillConfig(str(tmp_path), **o),
    ]
    for name, beta, skew, tail in BIASED:
        options = {"divergence": name, "beta": beta, "skew": skew, "tail": tail}
        for call in calls:
            with pytest.raises(ValueError, match=r"tail: expected 'bucket' or .*allow_biased=True"):
                call(**options)
            call(**options, allow_biased=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tail": "truncate"}, "'bucket' or 'renorm_both' with divergence='forward_kl', got"),
        (
            {"tail": "truncate", "divergence": "jsd", "beta": 0.0},
            "'bucket' or 'renorm_both' with divergence='jsd' at beta=0, got 'truncate'",
        ),
        (
            {"tail": "renorm_teacher", "divergence": "jsd"},
            "'bucket' or 'truncate' or 'renorm_both' with divergence='jsd', got",
        ),
    ],
)
def test_the_error_names_the_proper_tails(options, expected):
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"tail: expected {expected}"):
        fd.topk_distill_loss(z, eye, fd.linear_topk(z, eye, k=K), **options)


def test_allow_biased_is_a_boolean():
    with pytest.raises(ValueError, match="allow_biased: expected True or False, got 'yes'"):
        fd.TopKDistillLoss(allow_biased="yes")


def test_a_compiled_biased_loss_is_one_graph():
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)
    teacher = fd.linear_topk(z, eye, k=K)

    def loss(x):
        return fd.topk_distill_loss(x, eye, teacher, tail="truncate", allow_biased=True)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), loss(z))


@pytest.mark.parametrize("valid_vocab", [None, V - 3])
@pytest.mark.parametrize(("name", "beta", "skew"), VARIANTS, ids=str)
def test_a_dense_loss_is_smallest_at_the_teacher(name, beta, skew, valid_vocab):
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)

    def loss(student):
        return fd.linear_distill_loss(
            student,
            eye,
            z,
            eye,
            divergence=name,
            beta=beta,
            skew=skew,
            reduction="none",
            valid_vocab=valid_vocab,
        )

    at_teacher = loss(z)
    assert at_teacher.abs().max() < 1e-12
    for other in other_students(z):
        assert (loss(other) >= at_teacher - 1e-12).all()
