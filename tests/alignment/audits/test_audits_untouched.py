"""Every audit leaves its models, and everybody's random numbers, as it found them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits import Probes
from helpers.audit_probes import FULL, LIKED
from helpers.planted import subject

SUITE = Probes(**FULL).suite() | {"preference": Probes(**FULL | LIKED).suite()["preference"]}


def state(of):
    parts = {
        "training": {name: m.training for name, m in of.model.named_modules()},
        "grad": {n: (p.requires_grad, p.grad is None) for n, p in of.model.named_parameters()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in of.model.named_modules()
        },
        "generation": of.model.generation_config.to_dict(),
        "config": of.model.config.to_dict(),
        "padding": (of.tokenizer.padding_side, of.tokenizer.pad_token_id, len(of.tokenizer)),
    }
    return parts, {name: w.clone() for name, w in of.model.state_dict().items()}


def numbers():
    numpy_state: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SUITE)
def test_models_are_left_as_found(name, kind):
    of, base, control = (subject(kind, seed) for seed in (1, 0, 2))
    models = (of, base, control)
    for m in models:
        # Transformers watches layers by hooks that it keeps from when they are first asked.
        m.model.get_decoder()(torch.tensor([[1]]), output_hidden_states=True)
        m.model.train()  # as in the middle of somebody's training
        m.model.get_input_embeddings().weight.requires_grad_(False)
        next(module for module in m.model.modules() if not list(module.children())).eval()
    before, drawn = [state(m) for m in models], numbers()
    SUITE[name].run(of, base=base, controls={"control": control})
    assert numbers() == drawn
    for m, (parts, weights) in zip(models, before, strict=True):
        now, now_weights = state(m)
        assert now == parts
        assert all(torch.equal(now_weights[n], w) for n, w in weights.items())
        assert torch.is_grad_enabled()


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("name", SUITE)
def test_an_audit_says_the_same_again(name):
    of, base = subject("gpt2", 1), subject("gpt2", 0)
    of.model.train()  # dropout, where anyone forgot it
    first, again = (SUITE[name].run(of, base=base, controls={"base": base}) for _ in range(2))
    assert first == again
    assert first.n == len(first.values)
    assert first.value == pytest.approx(np.mean(first.values))
