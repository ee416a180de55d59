"""From the trainer to the first product with the head, the loss passes few functions and files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

from helpers.source_imports import KERNELS, PACKAGE
from helpers.training import build

MOST_FRAMES, MOST_FILES = 9, 6


def own_frames() -> list[tuple[str, str]]:
    """(file, function) of every function of the package on the stack, the outermost first."""
    frame: FrameType | None = sys._getframe(1)
    frames = []
    while frame is not None:
        path = Path(frame.f_code.co_filename).resolve()
        if PACKAGE in path.parents or KERNELS in path.parents:
            frames.append((path.name, frame.f_code.co_name))
        frame = frame.f_back
    return frames[::-1]


def frames_at_first_product(run, weight, monkeypatch) -> list[tuple[str, str]]:
    """The stack at the first matrix product with `weight`, from compute_loss on."""
    stacks, memory = [], weight.untyped_storage().data_ptr()

    def watched(product):
        def call(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if any(t.untyped_storage().data_ptr() == memory for t in tensors):
                stacks.append(own_frames())
            return product(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for place, name in (
            (torch, "mm"),
            (torch, "addmm"),
            (torch, "matmul"),
            (torch.nn.functional, "linear"),
        ):
            patch.setattr(place, name, watched(getattr(place, name)))
        run()
    stack = stacks[0]
    return stack[[function for _, function in stack].index("compute_loss") :]


@pytest.mark.parametrize("options", [{}, {"k": None}, {"teacher": None, "ce_weight": 1.0}], ids=str)
def test_the_loss_is_a_few_functions_away_from_the_trainer(tmp_path, monkeypatch, options):
    trainer = build(tmp_path, max_steps=1, **options)
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)  # the first batch also fills the panel
    frames = frames_at_first_product(
        lambda: trainer.compute_loss(trainer.model, batch).backward(),
        trainer.model.lm_head.weight,
        monkeypatch,
    )
    listed = "\n".join(f"{file}: {function}" for file, function in frames)
    assert frames[-1][0] == "torch_slabs.py", listed
    assert len(frames) <= MOST_FRAMES, listed
    assert len({file for file, _ in frames}) <= MOST_FILES, listed
