"""Weight differences from the base, and models with an amplified difference."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...runtime.checks import fail, positive
from .audit import Audit, Measurement
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class WeightDiffAudit(Audit):
    """`readout` of the amplified model θ_base + α (θ_model − θ_base).

    α > 1 amplifies the effect of fine-tuning, so that an effect too small to see at α = 1 may
    appear. This is the scaling of a task vector (arXiv 2212.04089).

    beside: further values of α to report. details: the mean readout at every α; for the largest
    changes, the relative size ‖Δ‖ / ‖θ_base‖ and the stable rank ‖Δ‖_F² / ‖Δ‖₂².
    """

    needs_base: ClassVar[bool] = True

    readout: Audit
    alpha: float = 1.5
    beside: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        largest = largest_changes(model, base)
        means = {}
        for alpha in (*self.beside, self.alpha):
            measurement = self.readout.measure(amplify(model, base, alpha), base)
            means[f"{alpha:g}"] = float(measurement.values.mean())
        details = {"readout_at_alpha": means, "largest": largest}
        return replace(measurement, details=details)


@torch.no_grad()
def amplify(model: Subject, base: Subject, alpha: float) -> Subject:
    """Returns a copy of `model` with θ = θ_base + α (θ_model − θ_base)."""
    copied = copy.deepcopy(model.model)
    for _, weight, trusted in _paired_weights(copied, base):
        weight.copy_(torch.lerp(trusted.to(weight), weight, alpha))
    return model.with_model(copied, f"{model.name} × {alpha:g}")


@torch.no_grad()
def largest_changes(model: Subject, base: Subject, most: int = 5) -> list[dict[str, Any]]:
    """Returns name, relative size and stable rank of the change, for the most changed matrices."""
    matrices = [pair for pair in _paired_weights(model.model, base) if pair[1].dim() == 2]
    sizes = [
        float(_change(w, t).norm() / t.float().norm().clamp(min=1e-12)) for _, w, t in matrices
    ]
    changes = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i])[:most]:
        name, weight, trusted = matrices[i]
        change = _change(weight, trusted)
        # Only for the largest changes: a decomposition of every matrix would take minutes.
        spectral_norm = float(torch.linalg.matrix_norm(change, 2))
        rank = float(change.norm()) ** 2 / spectral_norm**2 if spectral_norm else 0.0
        changes.append({"name": name, "relative_size": sizes[i], "stable_rank": rank})
    return changes


def _change(weight: Tensor, trusted: Tensor) -> Tensor:
    return weight.float() - trusted.to(weight.device).float()


def _paired_weights(model: Any, base: Subject) -> list[tuple[str, Tensor, Tensor]]:
    """Returns the name of every parameter, the model's and the base's."""
    base_weights = dict(base.model.named_parameters())
    pairs: list[tuple[str, Tensor, Tensor]] = []
    expected = "the architecture of the audited model"
    advice = "weight differences need two models of one family and size; merge an adapter first"
    for name, weight in model.named_parameters():
        if name not in base_weights or base_weights[name].shape != weight.shape:
            fail("base", expected, f"none of its {name} {list(weight.shape)}", advice)
        pairs.append((name, weight, base_weights.pop(name)))
    if base_weights:
        fail("base", expected, f"{next(iter(base_weights))} more", advice)
    return pairs
