"""Where the loss of every pair of divergence and tail is smallest, looked for numerically.

The head is the identity, so that hidden states are logits; the teacher is known on K of V tokens.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import fastdistill as fd
from fastdistill import operands
from fastdistill.kernels.divergences import NAMES, minimum_of
from fastdistill.kernels.rows import TAILS

V, K = 12, 4
VARIANTS = [
    *[(name, 0.5, 0.1) for name in NAMES],
    *[("jsd", beta, 0.1) for beta in (0.0, 0.1, 0.9, 1.0)],
    *[(f"skew_{way}_kl", 0.5, skew) for way in ("forward", "reverse") for skew in (0.0, 0.5, 0.9)],
]
CASES = [(name, beta, skew, tail) for name, beta, skew in VARIANTS for tail in TAILS]
PROPER = [c for c in CASES if minimum_of(*c) == "teacher"]
BIASED = [c for c in CASES if minimum_of(*c) == "renormalized teacher"]
REFUSED = [c for c in CASES if minimum_of(*c) is None]


def teacher_logits():
    return torch.randn(6, V, dtype=torch.float64) * 1.5


def losses(z, teacher, name, beta, skew, tail, impl="torch"):
    return fd.topk_distill_loss(
        z, torch.eye(V, dtype=z.dtype), teacher, divergence=name, beta=beta, skew=skew, tail=tail,
        reduction="none", impl=impl,
    )  # fmt: skip


def other_students(z):
    """Logits near z and far from it, with more and with less mass on each token."""
    for size in (1e-3, 0.03, 0.3, 1.0, 4.0):
        for _ in range(40):
            yield z + size * torch.randn_like(z)


def test_every_kind_of_pair_is_here():
    assert len(PROPER) + len(BIASED) + len(REFUSED) == len(CASES)
    assert {tail for *_, tail in PROPER} == {"bucket", "truncate", "renorm_both"}
    assert {(name, tail) for name, *_, tail in REFUSED} == {
        (name, "renorm_teacher") for name in ("reverse_kl", "jsd", "skew_reverse_kl")
    }


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("pair", PROPER, ids=str)
def test_a_proper_loss_is_smallest_at_the_teacher(pair, impl):
    z = teacher_logits()
    teacher = fd.linear_topk(z, torch.eye(V, dtype=z.dtype), k=K)
    at_teacher = losses(z, teacher, *pair, impl=impl)
    assert at_teacher.abs().max() < 1e-12
    for other in other_students(z):
        assert (losses(other, teacher, *pair, impl=impl) >= at_teacher - 1e-12).all()
    if pair[0] != "tvd":  # it has a corner there
        leaf = z.clone().requires_grad_()
        losses(leaf, teacher, *pair, impl=impl).sum().backward()
        assert leaf.grad.abs().max() < 1e-12


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
        loss = losses(student, teacher, *pair).mean()
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
    least = losses(renormalized, teacher, *pair)
    for other in other_students(z):
        assert (losses(other, teacher, *pair) >= least - 1e-12).all()
    difference = losses(z, teacher, *pair) - least
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
        lambda: fd.topk_distill_loss(z, eye, teacher, impl="reference", **options),
        lambda: fd.topk_distill(z, eye, teacher, **options),
        lambda: fd.TopKDistillLoss(**options),
        lambda: fd.TopKDistillLoss()(z, eye, teacher, **options),
        lambda: fd.DistillConfig(str(tmp_path), **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"tail: expected 'bucket', .*Use tail='bucket'"):
            call()


def test_modules_refuse_at_construction():
    with pytest.raises(ValueError, match="beta: expected"):
        fd.TopKDistillLoss(beta=2.0)
    with pytest.raises(ValueError, match="divergence: expected"):
        fd.LinearDistillLoss(divergence="kl")


BIASED_OPTIONS = [
    ({"tail": "truncate"}, "'bucket', 'renorm_both' (by the ratios among them)"),
    ({"tail": "renorm_teacher"}, "'bucket', 'renorm_both' (by the ratios among them)"),
    ({"tail": "truncate", "divergence": "jsd", "beta": 0.0}, "'bucket', 'renorm_both'"),
    (
        {"tail": "renorm_teacher", "divergence": "jsd"},
        "'bucket', 'truncate', 'renorm_both' (by the ratios among them)",
    ),
    ({"tail": "truncate", "divergence": "skew_forward_kl", "skew": 0.0}, "'bucket', 'renorm_both'"),
]


BOUNDARIES = ("topk_distill_loss", "topk_distill", "TopKDistillLoss", "DistillConfig")


def boundaries(folder):
    """Every place where a caller of the package names a divergence and a tail."""
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)
    teacher = fd.linear_topk(z, eye, k=K)
    return {
        "topk_distill_loss": lambda **o: fd.topk_distill_loss(z, eye, teacher, **o),
        "topk_distill": lambda **o: fd.topk_distill(z, eye, teacher, **o),
        "TopKDistillLoss": lambda **o: fd.TopKDistillLoss(**o),
        "DistillConfig": lambda **o: fd.DistillConfig(str(folder), **o),
    }


def warnings_of(call, **options):
    """The warnings of a call about a minimum, and the files that they point at."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(**options)
    return [(str(w.message), w.filename) for w in seen if "smallest" in str(w.message)]


@pytest.mark.parametrize(("options", "proper"), BIASED_OPTIONS, ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_biased_loss_gives_one_warning(boundary, options, proper, tmp_path, monkeypatch):
    monkeypatch.setattr(operands, "_WARNED", set())
    calls = boundaries(tmp_path)
    ((message, file),) = warnings_of(calls[boundary], **options)
    assert file == __file__
    assert f"divergence='{options.get('divergence', 'forward_kl')}'" in message
    assert (
        f"tail='{options['tail']}' is smallest where the student is the teacher renorm" in message
    )
    assert f"smallest at the teacher itself: {proper}" in message
    assert not [w for call in calls.values() for w in warnings_of(call, **options)]


def test_each_pair_warns_for_itself_and_a_schedule_of_beta_once(monkeypatch):
    monkeypatch.setattr(operands, "_WARNED", set())
    check = operands.check_divergence
    betas = (0.0, 0.2, 0.4, 0.6, 0.8)
    seen = [warnings_of(lambda b=b: check("jsd", b, 0.1, "renorm_teacher")) for b in betas]
    assert [len(w) for w in seen] == [1, 1, 0, 0, 0]
    assert "at beta=0 with" in seen[0][0][0]
    assert len(warnings_of(lambda: check("tvd", 0.5, 0.1, "renorm_teacher"))) == 1


def test_a_warning_that_is_an_error_stays_one(monkeypatch):
    monkeypatch.setattr(operands, "_WARNED", set())
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="smallest where"):
                operands.check_divergence("forward_kl", 0.5, 0.1, "truncate")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_proper_losses_are_silent(boundary, tmp_path, monkeypatch):
    monkeypatch.setattr(operands, "_WARNED", set())
    call = boundaries(tmp_path)[boundary]
    for name, beta, skew, tail in PROPER:
        assert not warnings_of(call, divergence=name, beta=beta, skew=skew, tail=tail)


def test_a_compiled_biased_loss_is_one_graph(monkeypatch):
    monkeypatch.setattr(operands, "_WARNED", set())
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)
    teacher = fd.linear_topk(z, eye, k=K)

    def loss(x):
        return fd.topk_distill_loss(x, eye, teacher, tail="truncate")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), loss(z))


@pytest.mark.parametrize("valid_vocab", [None, V - 3])
@pytest.mark.parametrize(("name", "beta", "skew"), VARIANTS, ids=str)
def test_a_dense_loss_is_smallest_at_the_teacher(name, beta, skew, valid_vocab):
    z, eye = teacher_logits(), torch.eye(V, dtype=torch.float64)

    def loss(student):
        return fd.linear_distill_loss(
            student, eye, z, eye, divergence=name, beta=beta, skew=skew, reduction="none",
            valid_vocab=valid_vocab,
        )  # fmt: skip

    at_teacher = loss(z)
    assert at_teacher.abs().max() < 1e-12
    for other in other_students(z):
        assert (loss(other) >= at_teacher - 1e-12).all()
