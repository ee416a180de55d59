"""Makes training independent of torch's default dtype and default device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Set torch's default dtype to float32 and its default device to the CPU, then restore both.

    Scripts change them to build small models, but transformers' sums of the loss, new adapters and
    samplers follow them. Also usable as a decorator.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # A device context runs Python for every operation, so use it only if the device differs.
    device_context: Any = nullcontext() if device.type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with device_context:
            yield
    finally:
        torch.set_default_dtype(dtype)
