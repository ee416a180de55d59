"""Models with an amplified difference from the base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...runtime.checks import fail, positive
from .audit import Audit, Measurement
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class WeightDiffAudit(Audit):
    """`readout` of the amplified model θ_base + α (θ_model − θ_base).

    α > 1 amplifies the effect of fine-tuning, so that an effect too small to see at α = 1 may
    appear. This is the scaling of a task vector (arXiv 2212.04089).
    """

    needs_base: ClassVar[bool] = True

    readout: Audit
    alpha: float = 1.5

    def __post_init__(self) -> None:
        positive("alpha", self.alpha)

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        return self.readout.measure(amplify(model, base, self.alpha), base)


@torch.no_grad()
def amplify(model: Subject, base: Subject, alpha: float) -> Subject:
    """Returns a copy of `model` with θ = θ_base + α (θ_model − θ_base)."""
    copied = copy.deepcopy(model.model)
    weights, trusted = (dict(m.named_parameters()) for m in (copied, base.model))
    shapes, trusted_shapes = (
        {name: list(weight.shape) for name, weight in of.items()} for of in (weights, trusted)
    )
    if shapes != trusted_shapes:
        other = [name for name in shapes if trusted_shapes.get(name) != shapes[name]]
        more = next((name for name in trusted if name not in weights), "")
        fail(
            "base",
            "the architecture of the audited model",
            f"none of its {other[0]} {shapes[other[0]]}" if other else f"{more} more",
            "weight differences need two models of one family and size; merge an adapter first",
        )
    for name, weight in weights.items():
        weight.copy_(torch.lerp(trusted[name].to(weight), weight, alpha))
    return model.with_model(copied, f"{model.name} × {alpha:g}")
