"""Images and videos of a row: the tensors of a processor that a vision model reads with the ids.

    pixel_values [images, …]   image_grid_thw [images, 3]   image_sizes [images, 2]   …

Each row has its tensors as the processor returns them for this row alone. A batch concatenates
those of its rows, in order, because vision models put the features of images at the placeholder
tokens of input_ids in order.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.checks import fail
from ..runtime.printable import printable

COLUMNS = (
    "pixel_values",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)
TOKEN_TYPES = "mm_token_type_ids"  # [T]: the kind of each token, which the ids determine
_TYPE_OF = {"image": 1, "video": 2, "audio": 3}
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class ImageInputs:
    """The tensors that a model reads with input_ids and attention_mask.

    columns: their names; empty for a model of text. placeholders: "image", "video" or "audio" -> id
    of the token that stands for a part of one.
    """

    columns: tuple[str, ...] = ()
    placeholders: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> ImageInputs:
        """Return the image inputs of a transformers model, which has no adapters."""
        config = getattr(model, "config", None)
        placeholders = {}
        for kind in _TYPE_OF:
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                if isinstance(token := getattr(config, name, None), int):
                    placeholders[kind] = token
        return cls(forward_inputs(model, (*COLUMNS, TOKEN_TYPES)), placeholders)

    def read(self, columns: Mapping[str, Any], ids: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a row, checked against its ids [T].

        Raises:
            ValueError: a column is not a tensor, an image has no placeholder token, or a
                placeholder token has no image.
        """
        tensors = {name: _tensor(name, columns[name]) for name in self.columns if name in columns}
        self.check(ids, tensors)
        kinds = self.token_types(ids)
        own = tensors.pop(TOKEN_TYPES, kinds)
        if not torch.equal(own, kinds):
            expected = "1 at image tokens, 2 at video tokens and 0 at others"
            fail(TOKEN_TYPES, expected, printable(own.tolist(), 60), "leave the column out")
        return tensors

    def check(self, ids: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless each kind of tensors and its placeholder come together."""
        if (names := tensors.keys() - {TOKEN_TYPES}) and not names & set(_PIXELS.values()):
            hint = "pass all tensors of the processor"
            fail(min(names), "pixel_values or pixel_values_videos beside it", "neither", hint)
        for kind, token in self.placeholders.items():
            pixels, place = _PIXELS.get(kind), f"the {kind} token (id {token})"
            has_token = bool((ids == token).any())
            if has_token and pixels not in self.columns:
                hint = f"the {kind} would be lost: remove the row, or the token if it has none"
                fail("input_ids", f"rows without {place}, whose {kind} is not read", "one", hint)
            if has_token and pixels not in tensors:
                hint = "pass input_ids and the other tensors, as the processor returns them"
                fail("input_ids", f"{pixels} beside {place}", "none", hint)
            if pixels in tensors and not has_token:
                hint = "pass the input_ids of the processor"
                fail(str(pixels), f"{place} in input_ids", "none", hint)

    def is_placeholder(self, ids: Tensor) -> Tensor:
        """Return which tokens stand for a part of an image, video or audio."""
        return self.token_types(ids) != 0

    def token_types(self, ids: Tensor) -> Tensor:
        """Return mm_token_type_ids: 0 for text, 1 for an image, 2 for a video, 3 for audio."""
        types = torch.zeros_like(ids)
        for kind, token in self.placeholders.items():
            types[ids == token] = _TYPE_OF[kind]
        return types

    def joined(self, rows: Sequence[Mapping[str, Tensor]], ids: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a batch with the ids [B, T]; empty if no row has any."""
        joined = {}
        for name in self.columns:
            parts = [row[name] for row in rows if name in row]
            if not parts:
                continue
            shapes = sorted({tuple(part.shape[1:]) for part in parts})
            if len(shapes) > 1:
                fail(
                    name,
                    "one shape for all images of a batch",
                    f"[…, {', '.join(map(str, shapes[0]))}] and "
                    f"[…, {', '.join(map(str, shapes[1]))}]",
                    "let the processor resize them, or set per_device_train_batch_size=1 and "
                    "per_device_eval_batch_size=1",
                )
            joined[name] = torch.cat(parts)
        if joined and TOKEN_TYPES in self.columns:
            joined[TOKEN_TYPES] = self.token_types(ids)
        return joined


def forward_inputs(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the names that the model's forward takes."""
    takes = inspect.signature(model.forward).parameters
    return tuple(name for name in names if name in takes)


def _tensor(name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        fail(name, "a tensor, as the processor returns it", printable(error, 80))
    if tensor.dim() == 0:
        fail(name, "a tensor, as the processor returns it", printable(repr(values), 60))
    return tensor.float() if tensor.dtype == torch.float64 else tensor
