"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

    L ← β L + (1 − β) G Gᵀ      R ← β R + (1 − β) Gᵀ G      G' = Q_Lᵀ G Q_R
    W ← W − η Q_L Adam(G') Q_Rᵀ        Q_L, Q_R: eigenvectors of L and R, renewed every few steps

Adam's first moment is stored in the basis of the weights and rotated on use; the second moment is
stored in the eigenbasis. Vectors and sides longer than `max_side` are not rotated. Without any
rotation, this is Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...runtime.checks import integer, positive


class SOAP(torch.optim.Optimizer):
    """The SOAP optimizer. betas: decay of the two moments, and of L and R."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float, float] = (0.9, 0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 10,
        max_side: int = 2048,
    ) -> None:
        positive("lr", lr)
        integer("every", every, 1)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"every": every, "max_side": max_side})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(grad), torch.zeros_like(grad)
            is_rotated = [grad.dim() == 2 and side <= group["max_side"] for side in grad.shape]
            state["sides"] = [
                grad.new_zeros(n, n) if t else None
                for n, t in zip(grad.shape, is_rotated, strict=True)
            ]
            state["bases"] = [None] * len(is_rotated)
        state["step"] += 1
        first, second, shampoo = group["betas"]
        for i, side in enumerate(state["sides"]):
            if side is not None:
                side.lerp_(grad @ grad.T if i == 0 else grad.T @ grad, 1 - shampoo)
        if state["step"] == 1 or state["step"] % group["every"] == 0:
            state["bases"] = [
                None if side is None else _eigenvectors(side, basis)
                for side, basis in zip(state["sides"], state["bases"], strict=True)
            ]
        state["mean"].lerp_(grad, 1 - first)
        rotated = _rotate(grad, state["bases"])
        state["square"].lerp_(rotated.square(), 1 - second)
        mean = _rotate(state["mean"], state["bases"]) / (1 - first ** state["step"])
        scale = (state["square"] / (1 - second ** state["step"])).sqrt_()
        eps = group["eps"]
        if any(basis is not None for basis in state["bases"]):
            # Along directions without gradient, rotation leaves only rounding errors.
            eps = eps + 16 * torch.finfo(scale.dtype).eps * scale.norm()
        update = _rotate(mean / (scale + eps), state["bases"], back=True)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"])


def _eigenvectors(side: Tensor, basis: Tensor | None) -> Tensor:
    """Returns the eigenvectors: first by eigh, then by one power iteration and QR."""
    if basis is None:
        eigenvectors: Tensor = torch.linalg.eigh(side).eigenvectors.flip(-1)
    else:
        eigenvectors = torch.linalg.qr(side @ basis).Q
    return eigenvectors


def _rotate(matrix: Tensor, bases: list[Tensor | None], back: bool = False) -> Tensor:
    """Returns the matrix in the eigenbasis, or with `back` in the basis of the weights."""
    left, right = bases if len(bases) == 2 else (None, None)
    if left is not None:
        matrix = (left if back else left.T) @ matrix
    if right is not None:
        matrix = matrix @ (right.T if back else right)
    return matrix
