"""Training does not depend on torch's default dtype and default device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Set torch's default dtype to float32 and its default device to the CPU, then restore both.

    Scripts change them to build models small. transformers' sums of the loss, new adapters and
    samplers follow them. Decorates functions, too.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # The context of a device runs Python for every operation: only where it changes something.
    place: Any = nullcontext() if device.type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with place:
            yield
    finally:
        torch.set_default_dtype(dtype)
