"""The format of hidden states on disk (answers="hidden"): the bits of the model's own type.

    n tokens · H hidden · L layers

    hidden    fp32, fp16 or uint16 [n, (L + 1) · H]    the outputs of the L layers, in the order of
                                                       the manifest, then the state at the head

bfloat16 is stored as the uint16 of its bits. The manifest has H, the layers and the type; its k is
0, and it has no temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime import checks
from .codec import Array

_KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_MAX_VALUES = 1 << 20  # of a token


@dataclass(frozen=True, kw_only=True)
class HiddenLayout:
    """What a cache of hidden states stores of a token."""

    size: int  # H
    layers: tuple[int, ...]
    dtype: str

    @classmethod
    def from_json(cls, entry: Any) -> HiddenLayout:
        """Return the layout that a manifest has; raise ValueError if it is not one."""
        if not isinstance(entry, Mapping) or entry.keys() != {"size", "layers", "dtype"}:
            checks.fail("hidden", "an object with size, layers and dtype", repr(entry))
        checks.integer("size", entry["size"], 1, _MAX_VALUES)
        layers = entry["layers"]
        if not isinstance(layers, list) or (len(layers) + 1) * entry["size"] > _MAX_VALUES:
            expected = f"a list of layers, with at most {_MAX_VALUES:,} values of a token"
            checks.fail("layers", expected, repr(layers))
        for layer in layers:
            checks.integer("layers", layer, 1)
        if len(set(layers)) != len(layers):
            checks.fail("layers", "different layers", layers)
        checks.choice("dtype", entry["dtype"], _KINDS)
        return cls(size=entry["size"], layers=tuple(layers), dtype=entry["dtype"])

    @property
    def states(self) -> int:
        """The number of states of a token: those of the layers, and the one at the head."""
        return len(self.layers) + 1

    @property
    def columns(self) -> dict[str, tuple[np.dtype[Any], int]]:
        """The type and the values per token of the array."""
        return {"hidden": (np.dtype(_KINDS[self.dtype]), self.states * self.size)}

    def pack(self, states: Tensor) -> dict[str, Array]:
        """Return states [n, L + 1, H] as they are stored."""
        flat = states.detach().flatten(1).to(getattr(torch, self.dtype)).cpu().contiguous()
        if flat.dtype == torch.bfloat16:
            return {"hidden": flat.view(torch.int16).numpy().view(np.uint16)}
        return {"hidden": flat.numpy()}

    def unpack(self, columns: Mapping[str, Array]) -> Tensor:
        """Return stored states as a tensor [n, L + 1, H], in the memory of the array."""
        stored = columns["hidden"]
        if self.dtype == "bfloat16":
            flat = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        else:
            flat = torch.from_numpy(stored)
        return flat.view(len(stored), self.states, self.size)


def find_not_finite(states: Tensor) -> int | None:
    """Return the first token of [n, L + 1, H] with NaN or infinity, or None."""
    wrong = ~states.isfinite().flatten(1).all(-1)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
