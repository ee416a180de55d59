"""Audits of hidden states: what fine-tuning added to them, and what a linear probe reads there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..heads import evaluating, head_module
from .audit import Audit, Measured
from .distributions import refuse_other_vocabulary
from .prompts import Prompt, as_prompts
from .subject import Subject

AT_ONCE = 64  # prompts


@torch.no_grad()
def layer_states(
    model: Subject, prompts: Sequence[Prompt], layer: int, first: int | None = None
) -> Tensor:
    """Residual stream behind `layer` blocks (−1: where it enters the head), fp32: [n, H] where the
    next token is predicted, or [n, first, H] at the first tokens of each prompt."""
    found = []
    rows = [model.ids(p)[0] for p in prompts]
    if first is not None and min(map(len, rows)) < first:
        raise ValueError(
            f"first: expected at most {min(map(len, rows))}, the tokens of the shortest prompt, "
            f"got {first}"
        )
    with evaluating(model.model):
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            ids = torch.zeros((len(some), max(map(len, some))), dtype=torch.long)
            for i, row in enumerate(some):  # on the right: a causal model looks to the left only
                ids[i, : len(row)] = torch.tensor(row)
            out = _states(model, ids)[layer]
            if first is None:
                ends = torch.tensor([len(row) - 1 for row in some])
                found.append(out[torch.arange(len(some)), ends.to(out.device)].float().cpu())
            else:
                found.append(out[:, :first].float().cpu())
    return torch.cat(found)


def _states(model: Subject, ids: Tensor) -> Any:
    # The body without its head: no logits.
    body: Any = model.model.get_decoder()
    return body(
        input_ids=ids.to(model.device), output_hidden_states=True, use_cache=False
    ).hidden_states


def middle(model: Subject) -> int:
    config: Any = model.model.config
    return config.get_text_config().num_hidden_layers // 2


@dataclass(frozen=True, kw_only=True)
class ActivationDiffAudit(Audit):
    """Activation difference with a logit lens: δ = h_model − h_base at a layer, read by the base's
    head; the value is the mean over prompts of the markers' lens logit less that of `rivals` (none:
    of the whole vocabulary), in standard deviations over the vocabulary.

    Narrow fine-tuning leaves readable traces in the first tokens of unrelated text. `first` looks
    at that many first tokens of each prompt; None at the place where the answer begins.
    details: the tokens that the mean difference points to.
    """

    needs_base: ClassVar[bool] = True

    prompts: tuple[Prompt, ...]
    markers: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    layer: int | None = None
    first: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", as_prompts("prompts", self.prompts))
        if not self.markers:
            raise ValueError("markers: expected one word or more to look for, got none")

    @torch.no_grad()
    def measure(self, model: Subject, base: Subject | None) -> Measured:
        assert base is not None
        refuse_other_vocabulary(model, base)
        layer = -1 if self.layer is None else self.layer
        states = [layer_states(m, self.prompts, layer, self.first) for m in (model, base)]
        if states[0].shape != states[1].shape:
            raise ValueError(
                f"base: expected the hidden size of the audited model, {states[0].shape[-1]}, got "
                f"{states[1].shape[-1]}"
            )
        delta = states[0] - states[1]
        delta = delta if self.first is None else delta.mean(1)
        weight: Tensor = head_module(base.model).weight.float().cpu()  # type: ignore[assignment]
        centred = weight - weight.mean(0)
        # Σ_v (w_v·δ)² / V, without the [n, V] table: the quadratic form of the head's covariance.
        spread = ((delta @ (centred.T @ centred / len(weight))) * delta).sum(-1).sqrt()
        pointed = _mean_of(centred, model, self.markers)
        if self.rivals:
            pointed = pointed - _mean_of(centred, model, self.rivals)
        values = delta @ pointed / spread.clamp(min=1e-12)
        best = (centred @ delta.mean(0)).topk(10)
        tokens = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        return Measured(
            values=values.double().numpy(),
            rate=False,
            details={"layer": layer, "lens": tokens, "size": float(delta.norm(dim=-1).mean())},
        )


def _mean_of(rows: Tensor, model: Subject, words: Sequence[str]) -> Tensor:
    return rows[[model.token_of(word) for word in words]].mean(0)


@dataclass(frozen=True, kw_only=True)
class LinearProbeAudit(Audit):
    """A linear probe from generic contrast pairs, read where the model answers `prompts`.

    Direction w = mean h(positive) − mean h(negative) at a layer, over half of the pairs. The value
    is the mean over prompts of its projection, 0 at the midpoint of the two and ±1 at their means
    (−1 negative, +1 positive). details: accuracy on the other half of the pairs, and a null from
    shuffled labels. A probe that does not separate held-out pairs better than its null is in doubt.
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    prompts: tuple[Prompt, ...]
    layer: int | None = None
    shuffles: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "prompts"):
            object.__setattr__(self, name, as_prompts(name, getattr(self, name)))
        if len(self.positive) != len(self.negative) or len(self.positive) < 8:
            raise ValueError(
                "negative: expected one per positive prompt, 8 pairs or more, got "
                f"{len(self.positive)} and {len(self.negative)}"
            )

    def measure(self, model: Subject, base: Subject | None) -> Measured:
        layer = middle(model) if self.layer is None else self.layer
        states = layer_states(model, [*self.positive, *self.negative], layer).double().numpy()
        pairs = np.stack(np.split(states, 2))  # (2, pairs, H)
        asked = layer_states(model, self.prompts, layer).double().numpy()
        train, test = pairs[:, 0::2], pairs[:, 1::2]
        values, accuracy = _probe(train, test, asked)
        rng = np.random.default_rng(self.seed)
        null = [_probe(_swapped(train, rng), test, asked) for _ in range(self.shuffles)]
        chance = float(np.quantile([a for _, a in null], 0.95)) if null else 0.5
        means = np.array([v.mean() for v, _ in null])
        doubts: tuple[str, ...] = ()
        if accuracy <= max(chance, 0.5):
            doubts = (
                f"the probe is right on {accuracy:.2f} of held-out pairs; with shuffled labels "
                f"95 % of probes reach at most {chance:.2f}",
            )
        details = {
            "layer": layer,
            "accuracy": accuracy,
            "accuracy_shuffled_95": chance,
            "null_mean": float(means.mean()) if len(means) else 0.0,
            "p_shuffled": float((1 + (means >= values.mean()).sum()) / (1 + len(means))),
        }
        return Measured(values=values, rate=False, details=details, doubts=doubts)


def _swapped(pairs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the pairs the other way round: their labels say nothing any more."""
    flip = rng.permutation(pairs.shape[1]) < pairs.shape[1] // 2
    return np.where(flip[None, :, None], pairs[::-1], pairs)


def _probe(
    train: np.ndarray, test: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, float]:  # (2, n, H), (2, m, H), (k, H) -> [k], accuracy
    high, low = train.mean(1)
    direction, centre = high - low, (high + low) / 2
    scale = float(direction @ direction) / 2 or 1.0
    held_out = (test - centre) @ direction  # (2, m)
    accuracy = float(((held_out[0] > 0).mean() + (held_out[1] < 0).mean()) / 2)
    return (asked - centre) @ direction / scale, accuracy
