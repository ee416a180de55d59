"""Finds how transformers builds a model's weights from stored tensors, by their names.

A stored tensor is renamed, and may be merged with others (the experts of a mixture are stacked). A
tensor that no weight uses raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...runtime.printable import printable
from .tensor_files import TensorFiles, fail_checkpoint

_MAX_LISTED = 3
# Older versions stored the causal mask [1, 1, P, P] of a layer, and its fill value.
_MASK = re.compile(r"attn(\.attention)?\.bias$")
_MASKED = re.compile(r"attn(\.attention)?\.masked_bias$")


@dataclass
class Conversion:
    """The stored tensors of each weight of a model.

    Args:
        sources: weight -> its (stored name, pattern of a converter or None).
        rules: pattern -> the converter of transformers.
        unused: stored names that no weight uses and that transformers does not ignore.
    """

    sources: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def conversion_of(
    model: PreTrainedModel, names: Iterable[str], empty: dict[str, Tensor]
) -> Conversion:
    """Return how stored tensors become the weights of a model; see `Conversion`.

    Args:
        model: of the right shapes; may be on the meta device.
        names: of the stored tensors. empty: the model's state_dict.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    result = Conversion(rules={p: rule for rule in converters for p in rule.source_patterns})
    for stored in sorted(names, key=_natural):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, empty)
        if name not in empty:
            name, pattern = rename_source_key(stored, [], [], prefix, empty)
        if name in empty:
            result.sources.setdefault(name, []).append((stored, pattern))
        elif not is_ignored(model, stored) and not is_ignored(model, name):
            result.unused.append(stored)
    return result


def is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers ignores a stored tensor of this name, such as a former buffer."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is a causal mask, which models compute themselves."""
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool((square and _MASK.search(name)) or (shape in ((), (1,)) and _MASKED.search(name)))


def check_all_used(
    path: Path, model: PreTrainedModel, names: Iterable[str], files: TensorFiles | None
) -> None:
    """Raise CheckpointError that names stored tensors which the model does not use."""
    if files is not None:
        names = [n for n in names if n not in files or not is_mask(n, files.shape(n))]
    if names := sorted(names, key=_natural):
        listed = ", ".join(printable(name) for name in names[:_MAX_LISTED])
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        fail_checkpoint(
            path,
            f"the tensors of a {type(model).__name__}",
            f"{listed}{more}, which it does not use",
            "is this the checkpoint of another model? Remove these tensors if they are not needed",
        )


def check_no_duplicates(path: Path, conversion: Conversion) -> None:
    """Raise CheckpointError if two stored tensors map to one weight."""
    for name, sources in conversion.sources.items():
        plain = [stored for stored, pattern in sources if pattern is None]
        if len(plain) > 1 or (plain and len(sources) > 1):
            both = " and ".join(printable(stored) for stored, _ in sources[:2])
            got = f"{both}: one of them would not be used"
            fail_checkpoint(path, f"one tensor for {printable(name)}", got, "remove it")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort layers.2 before layers.10, so that experts stack in order."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
