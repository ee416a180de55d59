"""The outputs of some decoder layers, which the draft models of EAGLE-3 read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..runtime import checks
from .positions import text_config


def check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless these are different layers of the model, from 1 on."""
    count = len(_decoder_layers(model))
    for layer in layers:
        checks.integer("layers", layer, 1, count)
    if len(set(layers)) != len(layers):
        checks.fail("layers", "different layers", list(layers))


@contextmanager
def layer_outputs(model: nn.Module, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect the outputs [B, T, H] of these layers, in this order, of one forward pass.

    Layers count from 1, as the ids of vLLM and of hidden_states in transformers do: the output of
    the last one enters the final norm.
    """
    outputs: list[Any] = [None] * len(layers)

    def keep(at: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[at] = output[0] if isinstance(output, tuple) else output

        return hook

    decoder = _decoder_layers(model) if layers else nn.ModuleList()
    handles = [decoder[n - 1].register_forward_hook(keep(at)) for at, n in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a causal language model."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    for module in (decoder or model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise TypeError(
        f"model: expected a decoder with a list of its {count} layers, got "
        f"{type(model).__name__}. Leave out layers: the state at the head needs no such list"
    )
