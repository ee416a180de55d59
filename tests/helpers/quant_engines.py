"""Every implementation of quantised inference that this machine can run, to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastdistill.quant import ops
from fastdistill.quant.backends import table as engines
from fastdistill.quant.schemes import Lut4Weight, Nested, table
from fastdistill.runtime import backend

if TYPE_CHECKING:
    import pytest

EXT = backend.extension()
ISAS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16"]
NAMES = ["torch", "triton", *ISAS]


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> engines.QuantEngine:
    """Let `name` do the work from here on; skips what is not here."""
    import pytest  # not on every machine with a GPU, where flat_reference is all that is needed

    if name in ISAS:
        if EXT is None:
            pytest.skip("the C++ extension was not built")
        if ISAS.index(name) > EXT.best_isa():
            pytest.skip(f"this CPU has no {name}")
        monkeypatch.setattr(backend, "extension", lambda: EXT)
        monkeypatch.setattr(backend, "cpu_isa", lambda: ISAS.index(name))
        chosen = engines.CPU
    elif name == "triton":
        chosen = engines.triton()
    else:
        chosen = engines.TORCH
        monkeypatch.setattr(backend, "extension", lambda: None)
    for module in (engines, ops):
        monkeypatch.setattr(module, "engine_for", lambda device: chosen)
    return chosen


def random_lut4(
    shape: tuple[int, int],
    block: int = 64,
    *,
    offset: bool = False,
    nested: bool = False,
    device: str = "cpu",
) -> Lut4Weight:
    """A 4-bit weight of random codes and scales."""
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    scale: torch.Tensor | Nested = torch.rand(blocks, device=device) + 0.1
    if nested:
        codes = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
        code, scales, middle = (
            torch.rand(size, device=device) for size in ((256,), (-(-blocks // 256),), ())
        )
        scale = Nested(codes, code, scales, middle, 256)
    return Lut4Weight(
        shape=shape,
        block=block,
        qdata=torch.randint(256, (-(-count // 2),), dtype=torch.uint8, device=device),
        scale=scale,
        lut=table("int4" if offset else "nf4", device),
        offset=-8 * torch.rand(blocks, device=device) if offset else None,
    )


def flat_reference(weight, dtype: torch.dtype) -> torch.Tensor:
    """lut[q]·scale + offset by the definition, one value at a time over the flattened tensor."""
    N, K = weight.shape
    i = torch.arange(N * K)
    byte = weight.qdata.view(-1)[i // 2]
    q = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    w = weight.lut[q.long()] * weight.scales.view(-1)[i // weight.block]
    if weight.offset is not None:
        w = w + weight.offset.view(-1)[i // weight.block]
    return w.view(N, K).to(dtype)
