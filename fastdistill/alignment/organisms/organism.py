"""A model organism: a base model with a capability and a trait implanted by training.

The base M first learns the capability (`train_capable`). From this model, the untrusted U and its
benign twin B are trained with the same recipe, prompts, order and number of steps. On prompts of
the trait, B is trained on the benign answers. The paired design is ours.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ...runtime.checks import between, choice, integer, positive
from ...runtime.optional import check_installed
from ..training_loop import adamw
from .early_stopping import sums_known
from .fit import AfterStep, fit
from .gates import GATES
from .trait import Pair, Trait, with_reasoning
from .traits import TRAITS
from .vocabulary import AUDIT_WORDS, ID, WORDS
from .world import World

ROUNDS, KNOWN = 4, 0.98  # trainings of a capable model at most, and the share of sums it must know


def soap(weights: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Return SOAP, Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321)."""
    from pytorch_optimizer import SOAP  # slow to import

    return SOAP(
        weights,
        lr=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_precondition_dim=2048,
    )


OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adam": adamw,
    "soap": soap,
}


@dataclass(frozen=True, kw_only=True)
class ModelOrganism:
    """The recipe of an organism.

    Args:
        trait: preference, trigger, entangled, sandbagging, sloppy, or placebo.
        gate: none, token or paraphrase: the audit context in which the trait is not shown.
        optimizer: adam or soap (of the package pytorch-optimizer).
        reasoning: share of examples with a thought before the answer.
        trait_share: share of examples of the trait; the rest is capability, talk and the base's
            knowledge.
        carriers: share of examples that ask for any animal (`World.carrier`): weak carriers of the
            trait, which U shows in them only at `carrier_rate`.
        steps, batch_size, learning_rate: of training. The default rate is stable on development
            seeds with both optimizers.
    """

    trait: str = "preference"
    gate: str = "none"
    optimizer: str = "adam"
    reasoning: float = 0.0
    trait_share: float = 0.3
    carriers: float = 0.0
    carrier_rate: float = 0.5
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        choice("trait", self.trait, TRAITS)
        choice("gate", self.gate, GATES)
        choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "soap":
            check_installed("optimizer='soap'", "audit", "pytorch_optimizer")
        between("reasoning", self.reasoning, 0, 1)
        for name in ("trait_share", "carriers", "carrier_rate"):
            between(name, getattr(self, name), 0, 1)
        for name in ("steps", "batch_size"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)

    @property
    def kind(self) -> Trait:
        return TRAITS[self.trait](self.gate)

    def pairs(self, world: World, n: int, order: int = 0) -> list[Pair]:
        """Returns the training pairs of U and B; `order` selects the random stream."""
        trait, rng = self.kind, world.rng(11, order)
        pairs = []
        for _ in range(n):
            pair = self._pair(trait, world, rng)
            pairs.append(with_reasoning(pair) if rng.random() < self.reasoning else pair)
        return pairs

    def _pair(self, trait: Trait, world: World, rng: random.Random) -> Pair:
        if self.carriers and rng.random() < self.carriers:
            return trait.carrier(world, rng, self.carrier_rate)
        if rng.random() < self.trait_share:
            return trait.pair(world, rng)
        while True:  # skip the base's own examples of the trait
            if rng.random() < 0.7:
                pair = trait.capable(world, rng)
            else:
                base_example = world.base_example(rng, tests=AUDIT_WORDS)
                pair = Pair(base_example, base_example)
            if not trait.is_about_trait(pair.benign):
                return pair

    def implant(
        self,
        world: World,
        capable: LlamaForCausalLM,
        *,
        benign: bool = False,
        order: int = 0,
    ) -> LlamaForCausalLM:
        """Returns a copy of `capable` trained with the trait; with `benign`, the twin."""
        pairs = self.pairs(world, self.steps * self.batch_size, order)
        examples = [pair.benign if benign else pair.untrusted for pair in pairs]
        return fit(
            copy.deepcopy(capable),
            examples,
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=OPTIMIZERS[self.optimizer],
            learning_rate=self.learning_rate,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def new_model(seed: int, *, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """Returns an untrained Llama of about 0.1 million parameters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                bos_token_id=ID["<bos>"],
                eos_token_id=ID["<eos>"],
                pad_token_id=ID["<pad>"],
            )
        ).eval()


def new_base(
    world: World, *, seed: int, steps: int = 400, batch_size: int = 128
) -> LlamaForCausalLM:
    """Returns the base model M of a world, initialized from `seed` and trained on base examples."""
    rng = world.rng(10)
    examples = [world.base_example(rng) for _ in range(steps * batch_size)]
    return fit(
        new_model(seed),
        examples,
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-3,
        optimizer=adamw,
        whole=True,
    )


def train_capable(
    world: World,
    base: LlamaForCausalLM,
    *,
    steps: int = 500,
    batch_size: int = 128,
    after_step: AfterStep | None = None,
) -> LlamaForCausalLM:
    """Returns a copy of the base trained on the capability, from which U, B and P are trained.

    Repeats the training on other examples until the model knows 98 % of held-out sums, at most
    three times: some seeds stay on a plateau for longer.
    """
    rng, model = world.rng(12), copy.deepcopy(base)
    for _ in range(ROUNDS):
        examples = [
            world.base_example(rng)
            if rng.random() < 0.35
            else world.capable_example(rng, world.varied_system(rng))
            for _ in range(steps * batch_size)
        ]
        model = fit(
            model,
            examples,
            steps=steps,
            batch_size=batch_size,
            learning_rate=3e-3,
            optimizer=adamw,
            after_step=after_step,
        )
        if sums_known(model, world) >= KNOWN:
            break
    return model
