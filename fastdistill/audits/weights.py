"""What fine-tuning did to the weights, and the model that has more of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .audit import Audit, Measured
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class WeightDiffAudit(Audit):
    """`readout` of the amplified model θ_base + α (θ_model − θ_base).

    α > 1 exaggerates what fine-tuning taught: a trace too small to see at α = 1 may show. details:
    the readout's mean at every α, and of the largest changes their relative size ‖Δ‖ / ‖θ_base‖
    and their stable rank ‖Δ‖_F² / ‖Δ‖₂².
    """

    needs_base: ClassVar[bool] = True

    readout: Audit
    alpha: float = 1.5
    beside: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {self.alpha}")

    def measure(self, model: Subject, base: Subject | None) -> Measured:
        assert base is not None
        changes = differences(model, base)
        means = {}
        for alpha in self.beside:
            means[f"{alpha:g}"] = float(self._at(model, base, alpha).values.mean())
        found = self._at(model, base, self.alpha)
        means[f"{self.alpha:g}"] = float(found.values.mean())
        largest = sorted(changes, key=lambda row: -row["relative_size"])[:5]
        details: dict[str, Any] = {"readout_at_alpha": means, "largest": largest}
        return Measured(values=found.values, rate=found.rate, details=details, doubts=found.doubts)

    def _at(self, model: Subject, base: Subject, alpha: float) -> Measured:
        return self.readout.measure(amplified(model, base, alpha), base)


@torch.no_grad()
def amplified(model: Subject, base: Subject, alpha: float) -> Subject:
    """A copy of `model` with θ = θ_base + α (θ_model − θ_base)."""
    other = copy.deepcopy(model.model)
    for (_, weight), trusted in _paired(other, base):
        weight.copy_(torch.lerp(trusted.to(weight), weight, alpha))
    return Subject(other, model.tokenizer, name=f"{model.name} × {alpha:g}", impl=model.impl)


@torch.no_grad()
def differences(model: Subject, base: Subject) -> list[dict[str, Any]]:
    """Per matrix: name, relative size and stable rank of the change."""
    found = []
    for (name, weight), trusted in _paired(model.model, base):
        change = (weight - trusted.to(weight)).float()
        if change.dim() != 2:
            continue
        size = float(change.norm() / trusted.float().norm().clamp(min=1e-12))
        top = float(torch.linalg.matrix_norm(change, 2)) if size else 0.0
        rank = float(change.norm()) ** 2 / top**2 if top else 0.0
        found.append({"name": name, "relative_size": size, "stable_rank": rank})
    return found


def _paired(model: Any, base: Subject) -> list[tuple[tuple[str, Tensor], Tensor]]:
    theirs = dict(base.model.named_parameters())
    pairs: list[tuple[tuple[str, Tensor], Tensor]] = []
    for name, weight in model.named_parameters():
        if name not in theirs or theirs[name].shape != weight.shape:
            raise ValueError(
                f"base: expected the architecture of the audited model, got none of its {name} "
                f"{list(weight.shape)}. Weight differences need two models of one family and size; "
                "merge an adapter first"
            )
        pairs.append(((name, weight), theirs[name]))
    return pairs
