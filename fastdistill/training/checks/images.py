"""Checks that the options and the teacher of a run do not drop the images of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...hf.images import ImageInputs, forward_inputs
from ...runtime import checks
from ...teachers.local import Teacher
from ..config import DistillConfig
from .dataset import some_of


def columns_with_images(inputs: ImageInputs, datasets: Mapping[str, Any]) -> list[str]:
    """Return the columns of images that a sample of the datasets' examples has."""
    examples = [x for dataset in datasets.values() for _, x in some_of(dataset)]
    return [name for name in inputs.columns if any(x.get(name) is not None for x in examples)]


def check_images(columns: Iterable[str], teacher: Any, config: DistillConfig) -> None:
    """Raise ValueError if the teacher or an option would lose these tensors of images.

    Without columns nothing is checked.
    """
    names = list(columns)
    if not names:
        return
    if config.packing:
        hint = "packed rows have no images: leave packing out"
        checks.fail("packing", "False with images in the rows", True, hint)
    if config.lmbda:
        hint = "the student samples from ids alone: leave lmbda out"
        checks.fail("lmbda", "0 with images in the rows", f"{config.lmbda:g}", hint)
    if teacher is None:
        return
    if not isinstance(teacher, Teacher):
        checks.fail(
            "teacher",
            f"a model in this process, which reads {', '.join(names)}",
            type(teacher).__name__,
            "it reads ids alone, and the images would be lost; pass the model",
        )
    missing = set(names) - set(forward_inputs(teacher.model, names))
    if missing:
        expected = f"a model that reads {', '.join(names)}, as the student"
        got = f"{type(teacher.model).__name__} without {', '.join(sorted(missing))}"
        checks.fail("teacher", expected, got, "use a vision teacher")


def check_undivided(config: DistillConfig, train_dataset: Any) -> None:
    """Raise ValueError if accelerate would split the batches of a stream into rows.

    The tensors of images of a batch do not have one row for each of its rows.
    """
    splits = config.accelerator_config.dispatch_batches is not False
    if config.world_size > 1 and splits and not hasattr(train_dataset, "__len__"):
        checks.fail(
            "accelerator_config",
            "dispatch_batches=False with images in a stream and several processes",
            config.accelerator_config.dispatch_batches,
            "one process would split its batches by rows, and tensors of images have other rows",
        )
