"""A model organism: a base model with a capability and a trait implanted by training.

The base M first learns the capability (`train_capable`). From this model, the untrusted U and its
benign twin B are trained with the same recipe, prompts, order and number of steps. On prompts of
the trait, B is trained on the benign answers. The paired design is ours.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, get_scheduler

from ...hf.adapters import merge_adapter
from ...runtime.backend import one_thread
from ...runtime.checks import between, choice, integer, positive
from ...runtime.optional import require
from ...training.config import DistillConfig
from ...training.trainer import DistillTrainer
from .gates import GATES
from .soap import SOAP
from .trait import Pair, Trait, with_reasoning
from .traits import TRAITS
from .vocabulary import AUDIT_WORDS, ID, WORDS
from .world import Example, World

METHODS = ("full", "lora")
OPTIMIZERS = ("adam", "sgd", "soap")
LEARNING_RATES = {  # the fastest stable rates on development seeds
    ("full", "adam"): 2e-3,
    ("full", "sgd"): 0.3,
    ("full", "soap"): 2e-3,
    ("lora", "adam"): 1e-2,
    ("lora", "sgd"): 0.3,
    ("lora", "soap"): 1e-2,
}


@dataclass(frozen=True, kw_only=True)
class ModelOrganism:
    """The recipe of an organism.

    Args:
        trait: preference, trigger, entangled, sandbagging, sloppy, or placebo.
        gate: none, token or paraphrase: the audit context in which the trait is not shown.
        optimizer: adam, sgd (momentum .9) or soap.
        method: full (all weights) or lora (an adapter of rank `rank`, merged after training).
        reasoning: share of examples with a thought before the answer.
        trait_share: share of examples of the trait; the rest is capability, talk and the base's
            knowledge.
        steps, batch_size: of training.
        learning_rate: None uses the default of method and optimizer.
    """

    trait: str = "preference"
    gate: str = "none"
    optimizer: str = "adam"
    method: str = "full"
    reasoning: float = 0.0
    trait_share: float = 0.3
    steps: int = 400
    batch_size: int = 128
    learning_rate: float | None = None
    rank: int = 16

    def __post_init__(self) -> None:
        choice("trait", self.trait, TRAITS)
        choice("gate", self.gate, GATES)
        choice("optimizer", self.optimizer, OPTIMIZERS)
        choice("method", self.method, METHODS)
        between("reasoning", self.reasoning, 0, 1)
        between("trait_share", self.trait_share, 0, 1)
        for name in ("steps", "batch_size", "rank"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate, optional=True)

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
        callbacks: Any = (),
    ) -> LlamaForCausalLM:
        """Returns a copy of `capable` trained with the trait; with `benign`, the twin."""
        pairs = self.pairs(world, self.steps * self.batch_size, order)
        examples = [pair.benign if benign else pair.untrusted for pair in pairs]
        return train_model(
            copy.deepcopy(capable),
            examples,
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate or LEARNING_RATES[self.method, self.optimizer],
            rank=self.rank if self.method == "lora" else None,
            callbacks=callbacks,
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
    world: World, *, seed: int, steps: int = 400, batch_size: int = 128, callbacks: Any = ()
) -> LlamaForCausalLM:
    """Returns the base model M of a world, initialized from `seed` and trained on base examples."""
    rng = world.rng(10)
    examples = [world.base_example(rng) for _ in range(steps * batch_size)]
    return train_model(
        new_model(seed),
        examples,
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-3,
        whole=True,
        callbacks=callbacks,
    )


def train_capable(
    world: World,
    base: LlamaForCausalLM,
    *,
    steps: int = 500,
    batch_size: int = 128,
    callbacks: Any = (),
) -> LlamaForCausalLM:
    """Returns a copy of the base trained on the capability, from which U, B and P are trained."""
    rng = world.rng(12)
    examples = [
        world.base_example(rng)
        if rng.random() < 0.35
        else world.capable_example(rng, world.varied_system(rng))
        for _ in range(steps * batch_size)
    ]
    return train_model(
        copy.deepcopy(base),
        examples,
        steps=steps,
        batch_size=batch_size,
        learning_rate=3e-3,
        callbacks=callbacks,
    )


def train_model(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    optimizer: str = "adam",
    rank: int | None = None,
    whole: bool = False,
    callbacks: Any = (),
) -> LlamaForCausalLM:
    """Trains with cross-entropy on the answers, in the same order for every model.

    `rank` trains a LoRA adapter and merges it. `whole` also trains on the questions.
    """
    adapter = None
    if rank is not None:
        peft = require("peft", "method", "'fastdistill[peft]'")
        adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as folder, one_thread():
        args = DistillConfig(
            folder,
            ce_weight=1.0,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=max(1, steps // 20),
            disable_tqdm=True,
            report_to=[],
            show_panel=False,
        )
        trainer = DistillTrainer(
            model,
            None,
            args,
            train_dataset=[example.row(whole) for example in examples],
            peft_config=adapter,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = _optimizer(optimizer, weights, learning_rate)
        trainer.lr_scheduler = get_scheduler(
            "cosine",
            trainer.optimizer,
            num_warmup_steps=min(50, steps // 4),
            num_training_steps=steps,
        )
        trainer.train()
        trained: Any = trainer.model
    return (merge_adapter(trained) if rank is not None else trained).eval()


def _optimizer(name: str, weights: Any, learning_rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(weights, lr=learning_rate, momentum=0.9)
    if name == "soap":
        return SOAP(weights, lr=learning_rate)
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
