"""The training losses of speculators: `from fastdistill.compat import speculators as losses`.

    p = softmax(targets), q = softmax(logits), α = Σ min(p, q)      per position, [B, T]

speculators' functions take logits [B, T, V] of the draft and of the verifier. These take
`HeadLogits` in their place, from which the logits are computed in slabs and never held. Logits of
at most 8192 tokens are accepted as they are. The verifier gets no gradient, as in the fused losses
of speculators.

`implementation` selects nothing, since there is one.
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

MOST_LOGITS = 8192  # tokens of a vocabulary whose logits are accepted: they need an identity head
# Those of speculators, so that the same data give the same loss.
_REDUCTION_EPS = 1e-5
_LEAST_ALPHA = 1e-5


@dataclass(frozen=True)
class HeadLogits:
    """Logits [B, T, V] that are not computed yet: hidden states [B, T, H] and an LM head.

        softcap · tanh(s / softcap),  s = logit_scale · (hidden weightᵀ + bias)

    Args:
        hidden: [B, T, H], after the final norm. weight: [V, H]. bias: [V] or None.

    `logits[:, 2:]` are those of fewer positions.
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
    """KL(p ‖ q) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="forward_kl")


def reverse_kl_div_loss(logits: Logits, targets: Logits) -> Tensor:
    """KL(q ‖ p) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="reverse_kl")


def js_div_loss(logits: Logits, targets: Logits) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) of each position with m = (p + q) / 2, [B, T]."""
    return _per_position(logits, targets, divergence="jsd", beta=0.5)


def ce_loss(logits: Logits, targets: Logits) -> Tensor:
    """−log q(argmax p) of each position, [B, T]."""
    return _per_position(logits, targets, divergence="argmax_ce")


def tv_loss(logits: Logits, targets: Logits) -> Tensor:
    """1 − α of each position, [B, T]."""
    return _per_position(logits, targets, divergence="tvd")


def neg_log_acceptance_loss(logits: Logits, targets: Logits) -> Tensor:
    """−log max(α, 1e-5) of each position, [B, T]; below the floor the gradient is 0."""
    return _per_position(logits, targets, divergence="nla").clamp(max=-math.log(_LEAST_ALPHA))


def lk_hybrid_loss(logits: Logits, targets: Logits, eta: float = 3.0) -> Tensor:
    """λ KL(p ‖ q) + (1 − λ)(1 − α) of each position, λ = e^{−eta α} without gradient, [B, T]."""
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
        checks.fail("targets", f"shape {list(draft.shape)} as logits", list(verifier.shape))
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
        hint = "pass HeadLogits(hidden, lm_head.weight): the logits are then never held"
        checks.fail(name, expected, f"{vocab} tokens", hint)
    return HeadLogits(logits, torch.eye(vocab, dtype=logits.dtype, device=logits.device))


def resolve_loss_config(spec: str, implementation: str = "fused") -> LossConfig:
    """Return {name: (function, weight)} of a name, or of JSON such as '{"ce": 0.1, "tv": 0.9}'.

    Args:
        spec: "kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid", or a JSON object of these
            names and their weights.
        implementation: "fused" or "eager", with the same result.

    Raises:
        ValueError: an unknown name or implementation, or a weight that is no number.
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
    """Return the weighted sum of losses and, of several, {name + "_loss": its value}.

    Each loss is a `loss_function`; the values are before weights, without gradient.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    values = {}
    for name, (loss_fn, weight) in loss_config.items():
        value = loss_function(logits, targets, loss_mask, pos_idx, loss_fn, decay_fn)
        total = total + weight * value
        values[f"{name}_loss"] = value.detach()
    return total, values if len(loss_config) > 1 else {}


def exp_loss_decay(pos_idx: Tensor, gamma: float, **others: Any) -> Tensor:
    """gamma^pos_idx; other keywords of a decay are unused."""
    return torch.as_tensor(gamma**pos_idx)


def dflash_loss_decay(
    pos_idx: Tensor, gamma: float, sample_from_anchor: bool = False, **others: Any
) -> Tensor:
    """e^{−(pos_idx − 1) / gamma}, and 0 at position 0, the anchor, which predicts nothing.

    With sample_from_anchor position 0 predicts, and the weight is e^{−pos_idx / gamma}.
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
    """`fastdistill.dpace_weights` of the cross-entropy of each position, [1, T]."""
    mask = loss_mask.reshape(elementwise_loss.shape) > 0
    return dpace_weights(elementwise_loss, block_size, alpha=dpace_alpha, mask=mask).reshape(1, -1)
