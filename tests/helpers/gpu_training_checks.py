"""What tests/test_gpu.py runs of the trainer: the updates a CPU makes, however they are cut."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from helpers.tolerances import relative

ON_GPU = torch.cuda.is_available()
CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
ON_POLICY = {"lmbda": 0.5, "max_new_tokens": 6, "max_steps": 4}


def run(**options):
    """(weights on the CPU, losses) of a short run on the device, or on the CPU with use_cpu."""
    from helpers.training import step_losses, train, weights

    here = {"use_cpu": not ON_GPU, "dataloader_pin_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(Path(folder), **(here | options))
    return weights(trainer).cpu(), step_losses(trainer)


def moved(weights, expected, least=1e-5):
    """How far apart two runs ended, as a share of how far they came."""
    from helpers.training import flat, llama

    way = (expected - flat(llama(0))).norm()
    assert way > least
    return float((weights - expected).norm() / way)


def a_student_learns_on_the_device_what_it_learns_on_the_cpu():
    for options in ({}, {"k": None}, {"token_selection": "entropy top 0.5"}):
        there, _ = run(**options, use_cpu=True)
        here, _ = run(**options)
        assert moved(here, there) < 1e-3, options


def how_a_batch_is_cut_changes_nothing():
    for options in ({}, ON_POLICY):
        whole, losses = run(**options)
        for cut in (CUT, {"packing": True}, CUT | {"packing": True}):
            weights, others = run(**options, **cut)
            assert moved(weights, whole) < 1e-4, (options, cut)
            assert relative(torch.tensor(others), torch.tensor(losses)) < 1e-5


def mixed_precision_checkpointed_and_compiled():
    _, exact = run()
    for options in (
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True},
        {"bf16": True, "torch_compile": ON_GPU, "packing": True},
        {"bf16": True, "backward": "recompute"},
    ):
        _, losses = run(**options)
        assert relative(torch.tensor(losses), torch.tensor(exact)) < 2e-2, options


CHECKS = [
    a_student_learns_on_the_device_what_it_learns_on_the_cpu,
    how_a_batch_is_cut_changes_nothing,
    mixed_precision_checkpointed_and_compiled,
]
