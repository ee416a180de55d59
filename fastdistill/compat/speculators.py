"""The training losses of speculators, computed from hidden states and LM heads.

    from fastdistill.compat import speculators as losses

    p = softmax(targets), q = softmax(logits), α = Σ min(p, q)      per position, [B, T]

The functions of speculators take logits [B, T, V] of the draft and of the verifier. These take
`HeadLogits` instead, compute the logits in slabs and never store [B, T, V]. They also accept logits
over at most 8192 tokens. The verifier gets no gradient, as in the fused losses of speculators.

`implementation` has no effect: there is one implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..losses.dense import linear_distill_loss
from ..losses.draft import dpace_weights
from ..runtime import checks, tensor_checks
from ..runtime.json_text import JSONError, parse_json

__all__ = [
    "HeadLogits",
    "LossConfig",
    "ce_loss",
    "compound_loss",
    "dflash_loss_decay",
    "dpace_loss_decay",
    "exp_loss_decay",
    "js_div_loss",
    "kl_div_loss",
    "lk_hybrid_loss",
    "loss_function",
    "neg_log_acceptance_loss",
    "resolve_loss_config",
    "reverse_kl_div_loss",
    "tv_loss",
]

MOST_LOGITS = 8192  # the largest vocabulary of plain logits, which get an identity matrix as head
# Those of speculators, so that the same data give the same loss.
_REDUCTION_EPS = 1e-5
_LEAST_ALPHA = 1e-5


@dataclass(frozen=True)
class HeadLogits:
    """Logits [B, T, V] that are not computed yet: hidden states [B, T, H] and an LM head.

        softcap · tanh(s / softcap),  s = logit_scale · (hidden weightᵀ + bias)

    Args:
        hidden: [B, T, H], after the final norm. weight: [V, H]. bias: [V] or None.

    `logits[:, 2:]` has the positions from 2 on.

    Example:
        >>> draft = HeadLogits(torch.randn(1, 12, 16, requires_grad=True), torch.randn(100, 16))
        >>> verifier = HeadLogits(torch.randn(1, 12, 32), torch.randn(100, 32))
        >>> kl_div_loss(draft, verifier).mean().backward()
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.weight.shape[0]])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __getitem__(self, at: Any) -> HeadLogits:
        return replace(self, hidden=self.hidden[at])


Logits = Tensor | HeadLogits
PositionLoss = Callable[[Logits, Logits], Tensor]
LossConfig = dict[str, tuple[PositionLoss, float]]


def kl_div_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return KL(p ‖ q) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="forward_kl")


def reverse_kl_div_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return KL(q ‖ p) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="reverse_kl")


def js_div_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return ½ KL(p ‖ m) + ½ KL(q ‖ m) of each position, with m = (p + q) / 2, [B, T]."""
    return _per_position(logits, targets, divergence="jsd", beta=0.5)


def ce_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return −log q(argmax p) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="argmax_ce")


def tv_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return 1 − α of each position, [B, T]."""
    return _per_position(logits, targets, divergence="tvd")


def neg_log_acceptance_loss(logits: Logits, targets: Logits) -> Tensor:
    """Return −log max(α, 1e-5) of each position, [B, T]; below the floor the gradient is 0."""
    return _per_position(logits, targets, divergence="nla").clamp(max=-math.log(_LEAST_ALPHA))


def lk_hybrid_loss(logits: Logits, targets: Logits, eta: float = 3.0) -> Tensor:
    """Return λ KL(p ‖ q) + (1 − λ)(1 − α) of each position, [B, T].

    λ = e^{−eta α} has no gradient (LK losses, arXiv 2602.23881).
    """
    return _per_position(logits, targets, divergence="lk_hybrid", eta=eta)


_LOSSES: dict[str, PositionLoss] = {
    "kl_div": kl_div_loss,
    "rkl": reverse_kl_div_loss,
    "jsd": js_div_loss,
    "ce": ce_loss,
    "tv": tv_loss,
    "nla": neg_log_acceptance_loss,
    "lk_hybrid": lk_hybrid_loss,
}


def _per_position(logits: Logits, targets: Logits, **options: Any) -> Tensor:
    draft, verifier = _at_head("logits", logits), _at_head("targets", targets)
    if draft.shape != verifier.shape:
        hint = "cut the same positions; with a reduced vocabulary pass verifier_head[t2d]"
        checks.fail("targets", f"shape {list(draft.shape)} as logits", list(verifier.shape), hint)
    return linear_distill_loss(
        draft.hidden,
        draft.weight,
        verifier.hidden,
        verifier.weight,
        bias=draft.bias,
        logit_scale=draft.logit_scale,
        softcap=draft.softcap,
        teacher_bias=verifier.bias,
        teacher_logit_scale=verifier.logit_scale,
        teacher_softcap=verifier.softcap,
        reduction="none",
        **options,
    )


def _at_head(name: str, logits: Logits) -> HeadLogits:
    if isinstance(logits, HeadLogits):
        return logits
    tensor_checks.tensor(name, logits, tensor_checks.FLOATS)
    if logits.dim() != 3:
        checks.fail(name, "shape [B, T, V]", list(logits.shape))
    vocab = logits.shape[-1]
    if vocab > MOST_LOGITS:
        expected = f"HeadLogits, or logits of at most {MOST_LOGITS} tokens"
        hint = "pass HeadLogits(hidden, lm_head.weight), which needs no logits"
        checks.fail(name, expected, f"{vocab} tokens", hint)
    return HeadLogits(logits, torch.eye(vocab, dtype=logits.dtype, device=logits.device))


def resolve_loss_config(spec: str, implementation: str = "fused") -> LossConfig:
    """Return {name: (function, weight)} from a name, or JSON such as '{"ce": 0.1, "tv": 0.9}'.

    Args:
        spec: "kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid", or a JSON object of these
            names and their weights.
        implementation: "fused" or "eager", with the same result.

    Raises:
        ValueError: an unknown name or implementation.
        TypeError: a weight that is not a number.
    """
    checks.choice("implementation", implementation, ("fused", "eager"))
    if spec in _LOSSES:
        return {spec: (_LOSSES[spec], 1.0)}
    names = ", ".join(map(repr, _LOSSES))
    weights = None
    with suppress(JSONError):
        weights = parse_json(spec, "spec", dict)
    if not weights:
        checks.fail("spec", f"one of {names}, or a JSON object of them with weights", repr(spec))
    for name, weight in weights.items():
        checks.choice("spec", name, _LOSSES)
        checks.number("spec", weight)
    return {name: (_LOSSES[name], float(weight)) for name, weight in weights.items()}


def loss_function(
    logits: Logits,
    targets: Logits,
    loss_mask: Tensor,
    pos_idx: Tensor,
    loss_fn: PositionLoss = kl_div_loss,
    decay_fn: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return the mean over rows of Σ mask · decay · loss / (Σ mask + 1e-5), a scalar.

    Args:
        loss_mask: [B, T]. pos_idx: [B, T], the position within each drafted block.
        loss_fn: a loss of this module. decay_fn: (pos_idx, elementwise_loss=[B, T]) -> [B, T].
    """
    losses = loss_fn(logits, targets)
    mask = loss_mask.to(losses.dtype)
    losses = losses * mask
    if decay_fn is not None:
        losses = losses * decay_fn(pos_idx.to(losses.dtype), elementwise_loss=losses)
    return (losses.sum(1) / (mask.sum(1) + _REDUCTION_EPS)).mean()


def compound_loss(
    logits: Logits,
    targets: Logits,
    loss_mask: Tensor,
    pos_idx: Tensor,
    loss_config: LossConfig,
    decay_fn: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of losses, and {name + "_loss": value} of each if there are several.

    Each value is that of `loss_function`, without its weight and without gradient.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    values = {}
    for name, (loss_fn, weight) in loss_config.items():
        value = loss_function(logits, targets, loss_mask, pos_idx, loss_fn, decay_fn)
        total = total + weight * value
        values[f"{name}_loss"] = value.detach()
    return total, values if len(loss_config) > 1 else {}


def exp_loss_decay(pos_idx: Tensor, gamma: float, **others: Any) -> Tensor:
    """Return gamma^pos_idx; the other keywords of a decay are ignored."""
    return torch.as_tensor(gamma**pos_idx)


def dflash_loss_decay(
    pos_idx: Tensor, gamma: float, sample_from_anchor: bool = False, **others: Any
) -> Tensor:
    """Return e^{−(pos_idx − 1) / gamma}, and 0 at position 0, the anchor, which predicts nothing.

    With sample_from_anchor, position 0 predicts a token, and the weight is e^{−pos_idx / gamma}.
    """
    if sample_from_anchor:
        return (-pos_idx / gamma).exp()
    return torch.where(pos_idx == 0, 0.0, (-(pos_idx - 1) / gamma).exp())


def dpace_loss_decay(
    pos_idx: Tensor,
    loss_mask: Tensor,
    block_size: int,
    dpace_alpha: float,
    elementwise_loss: Tensor,
    **others: Any,
) -> Tensor:
    """Return `fastdistill.dpace_weights` of the cross-entropy of each position, [1, T]."""
    mask = loss_mask.reshape(elementwise_loss.shape) > 0
    return dpace_weights(elementwise_loss, block_size, alpha=dpace_alpha, mask=mask).reshape(1, -1)
