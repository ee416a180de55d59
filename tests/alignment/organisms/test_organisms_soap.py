"""SOAP: Adam where nothing is rotated, and blind to rotations of the problem, which Adam is not."""

from __future__ import annotations

import io

import pytest
import torch

from fastdistill.alignment.organisms import soap
from fastdistill.alignment.organisms.soap import SOAP

BETAS = (0.9, 0.95)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(seed: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(randn(seed, n, n)).Q


def adam(params, **options):
    return torch.optim.Adam(params, betas=BETAS, **options)


def run(make, weight, grad_of, steps, **options):
    """The weight after `steps` of an optimiser whose gradient is a function of it."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = make([weight], **options)
    for step in range(steps):
        weight.grad = grad_of(weight.detach(), step)
        optimizer.step()
    return weight.detach()


def noisy(weight, step):
    return weight + randn(1000 + step, *weight.shape)


@pytest.mark.parametrize("shape", [(7,), (), (4, 3, 2), (0,)])
def test_what_is_no_matrix_is_updated_by_adam(shape):
    start = randn(0, *shape)
    torch.testing.assert_close(
        run(SOAP, start, noisy, 25, lr=0.01), run(adam, start, noisy, 25, lr=0.01)
    )


def test_a_matrix_with_sides_that_are_too_long_is_updated_by_adam():
    start = randn(1, 6, 4)
    expected = run(adam, start, noisy, 25, lr=0.01)
    torch.testing.assert_close(run(SOAP, start, noisy, 25, lr=0.01, max_side=3), expected)
    for one_side in (4, 6):
        actual = run(SOAP, start, noisy, 25, lr=0.01, max_side=one_side)
        assert (actual - expected).abs().max() > 1e-3


def test_with_the_identity_as_bases_it_is_adam(monkeypatch):
    monkeypatch.setattr(soap, "_eigenvectors", lambda side, basis: torch.eye(len(side)).double())
    start = randn(2, 5, 3)
    torch.testing.assert_close(
        run(SOAP, start, noisy, 25, lr=0.01), run(adam, start, noisy, 25, lr=0.01)
    )


def test_where_the_eigenbasis_is_the_weights_own_it_is_adam():
    start = torch.diag(randn(3, 6))
    scales = torch.diag(torch.tensor([1.0, 0.2, 5.0, 0.7, 2.0, 0.05]).double())

    def diagonal(weight, step):
        return scales * weight

    torch.testing.assert_close(
        run(SOAP, start, diagonal, 40, lr=0.01), run(adam, start, diagonal, 40, lr=0.01)
    )


def quadratic(left, right, best):
    """Gradient of ½ tr (W − W*)ᵀ A (W − W*) B, a little noise added."""

    def grad(weight, step):
        return left @ (weight - best) @ right

    return grad


def problem(decades: float, n: int = 6):
    """An ill-conditioned quadratic whose axes are not the weights' own."""
    u, v = orthogonal(4, n), orthogonal(5, n)
    curvature = torch.logspace(-decades / 2, decades / 2, n, dtype=torch.float64)
    left, right = u @ torch.diag(curvature) @ u.T, v @ torch.diag(curvature.flip(0)) @ v.T
    return left, right, randn(6, n, n)


def loss(weight, left, right, best):
    error = weight - best
    return 0.5 * (error * (left @ error @ right)).sum().item()


def test_rotating_a_problem_rotates_its_steps():
    left, right, best = problem(decades=1)
    u, v, start = orthogonal(7, 6), orthogonal(8, 6), torch.zeros(6, 6).double()
    turned = quadratic(u @ left @ u.T, v @ right @ v.T, u @ best @ v.T)
    plain = quadratic(left, right, best)
    for steps in (1, 12, 45):
        there = run(SOAP, u @ start @ v.T, turned, steps, lr=0.02)
        here = run(SOAP, start, plain, steps, lr=0.02)
        torch.testing.assert_close(there, u @ here @ v.T, rtol=1e-4, atol=1e-6)
    adams = [run(adam, u @ start @ v.T, turned, 12, lr=0.02), run(adam, start, plain, 12, lr=0.02)]
    assert (adams[0] - u @ adams[1] @ v.T).abs().max() > 1e-2


def test_it_beats_adam_on_a_problem_whose_axes_are_rotated():
    left, right, best = problem(decades=3)
    start, grad = torch.zeros(6, 6).double(), quadratic(left, right, best)

    def least(make):
        ends = [run(make, start, grad, 300, lr=lr) for lr in (0.003, 0.01, 0.03, 0.1)]
        return min(loss(end, left, right, best) for end in ends)

    assert least(SOAP) < 0.2 * least(adam)


def test_the_first_step_has_the_length_of_adams():
    start = randn(9, 5, 5)
    step = run(SOAP, start, lambda w, _: w, 1, lr=0.01) - start
    u, _, vh = torch.linalg.svd(start)
    torch.testing.assert_close(step, -0.01 * u @ vh, rtol=1e-4, atol=1e-6)  # −η sign of σ: U Vᵀ


def test_the_bases_are_renewed_every_few_steps(monkeypatch):
    made, calls = soap._eigenvectors, []

    def counted(side, basis):
        calls.append(basis is None)
        return made(side, basis)

    monkeypatch.setattr(soap, "_eigenvectors", counted)
    run(SOAP, randn(10, 3, 3), noisy, 12, lr=0.01, every=4)
    assert calls == [True, True] + 6 * [False]  # steps 1; 4, 8 and 12, both sides


def test_a_parameter_without_a_gradient_never_moves():
    still, moving = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = SOAP([still, moving], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        moving.grad = randn(0, 3, 3).float()
        optimizer.step()
    assert torch.equal(still, torch.ones(3, 3))
    assert still not in optimizer.state
    assert (moving != 1).all()


def test_empty_and_zero_gradients_do_no_harm():
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert run(SOAP, torch.zeros(shape), lambda w, _: w, 12, lr=0.1).shape == shape
    start = torch.ones(3, 4)
    end = run(SOAP, start, lambda w, _: torch.zeros_like(w), 12, lr=0.1)
    assert torch.equal(end, start)


def test_a_gradient_of_rank_one_moves_nothing_but_its_own_direction():
    """In fp32 its rounding, elsewhere in the eigenbasis, would be divided by itself."""
    a, b = randn(12, 64).float(), randn(13, 48).float()
    a, b = a / a.norm(), b / b.norm()
    start = torch.zeros(64, 48)
    for steps in (1, 15):
        moved = run(SOAP, start, lambda w, _: 3 * torch.outer(a, b), steps, lr=0.01)
        along = -(a @ moved @ b)
        assert abs(along - 0.01 * steps) < 1e-3 * steps
        assert (moved + along * torch.outer(a, b)).norm() < 0.5 * along  # it was 50 times as much


def test_weight_decay_is_decoupled():
    start = torch.ones(2, 2)
    end = run(SOAP, start, lambda w, _: torch.zeros_like(w), 2, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(end, start * 0.95**2)


def test_a_closure_gives_the_loss():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = SOAP([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    assert optimizer.step(closure).item() == 4.0
    assert closure().item() < 4.0


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been():
    whole = run(SOAP, randn(11, 5, 4), noisy, 27, lr=0.02)
    weight = torch.nn.Parameter(randn(11, 5, 4))
    optimizer = SOAP([weight], lr=0.02)
    for step in range(27):
        if step == 13:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = SOAP([weight], lr=9.0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        weight.grad = noisy(weight.detach(), step)
        optimizer.step()
    assert torch.equal(weight.detach(), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr: expected a finite number above 0"),
        ({"lr": float("nan")}, "lr: expected a finite number above 0, got nan"),
        ({"every": 0}, "every: expected an integer of 1 or more, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SOAP([torch.nn.Parameter(torch.ones(1))], **options)
