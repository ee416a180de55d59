"""Which way a student's first update has to go, by autograd over all logits in fp64.

AdamW's first step is −lr · g / (|g| + ε): every weight moves by the learning rate, against the sign
of its gradient, whatever the gradient's size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdistill.alignment.strategies.distil import Distilled
from fastdistill.alignment.strategies.strategy import Training
from helpers.strategy_scene import BASE, TEACHER

# A batch holds all lessons. Without warm-up: the only step has the whole learning rate.
ONE_STEP = Training(steps=1, batch_size=64, learning_rate=1e-3, max_new_tokens=3)

# (log q [n, V] at the targets, their labels [n], the row's number) -> summed loss
Wanted = Callable[[Tensor, Tensor, int], Tensor]


def log_p(model, ids: list[int], begin: int) -> Tensor:
    """[n, V], where the tokens from `begin` on are predicted."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits[begin - 1 : -1].log_softmax(-1)


def labels_only(log_q: Tensor, labels: Tensor, row: int) -> Tensor:
    return -log_q.gather(-1, labels[:, None]).sum()


def divergence_from(rows: Sequence[tuple[list[int], int]]) -> Wanted:
    """KL(p ‖ q) with the teacher's distributions on rows of its own."""
    model = copy.deepcopy(TEACHER.model).double()

    def wanted(log_q: Tensor, labels: Tensor, row: int) -> Tensor:
        with torch.no_grad():
            log_t = log_p(model, *rows[row])
        return (log_t.exp() * (log_t - log_q)).sum()

    return wanted


def stepped_along(made: Distilled, rows: Sequence[tuple[list[int], int]], wanted: Wanted) -> None:
    """The student moved against the gradient of `wanted` over these rows: token ids, and where the
    targets begin."""
    model = copy.deepcopy(BASE.model).double().requires_grad_(True)
    losses = [
        wanted(log_p(model, ids, begin), torch.tensor(ids[begin:]), i)
        for i, (ids, begin) in enumerate(rows)
    ]
    torch.stack(losses).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    moved = torch.cat(
        [
            (after.double() - before.double()).detach().flatten()
            for after, before in zip(
                made.student.model.parameters(), BASE.model.parameters(), strict=True
            )
        ]
    )
    large = gradient.abs() > 1e-3 * gradient.abs().max()
    assert large.sum() > 1000
    agree = (moved[large].sign() == -gradient[large].sign()).double().mean()
    assert agree > 0.999, f"{float(agree):.4f} of the weights moved against the gradient"
