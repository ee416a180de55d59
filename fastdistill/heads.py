"""The output head of a causal language model, and the hidden states that enter it.

Families differ in what happens around the head: Granite divides the logits, Cohere and Falcon-H1
multiply them, Gemma squashes them with tanh, GPT-J and Phi add a bias. None is patched here.
`at_head` watches one forward pass through the hooks of torch.nn.Module: it takes the hidden states
where they enter the head and lets the head itself see no position at all, so no logits exist.
`verify_head` compares with the model's own logits, so a multiplier that is not known here ends in
an error and never in a wrong loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .parallel import is_dtensor

# The same name, `logits_scaling`, multiplies in these and divides everywhere else.
_SCALING_MULTIPLIES = frozenset({"hyperclovax", "hyperclovax_vision_v2"})
# These divide the hidden states before the head, where the hook already sees them divided.
_SCALING_BEFORE_HEAD = frozenset({"minicpm3"})

_RELATIVE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """logits = softcap · tanh(s / softcap), s = logit_scale · (hidden · weightᵀ + bias)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None  # columns from here on are padding, as if their logit were −inf

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab

    def whole(self) -> LMHead:
        """This head, gathered where its rows lie on several ranks; without gradient there."""
        parts: dict[str, Any] = {"weight": self.weight, "bias": self.bias}
        gathered = {n: t.full_tensor().detach() for n, t in parts.items() if is_dtensor(t)}
        return replace(self, **gathered)

    def on(self, device: torch.device) -> LMHead:
        """This head elsewhere; the model stays where it is."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def options(self) -> dict[str, Any]:
        """The keywords that every loss and score takes beside hidden and weight."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "valid_vocab": self.valid_vocab,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """Dense logits, for checks on a few positions."""
        s = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)


def head_module(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits; refuses one that an adapter replaced."""
    find = getattr(model, "get_output_embeddings", None)
    module = find() if callable(find) else None
    if module is None:
        raise TypeError(
            "model: expected a causal language model with get_output_embeddings(), got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM"
        )
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise ValueError(
            f"model: expected a plain output head, got {type(module).__name__}: an adapter sits on "
            "lm_head, which the fused loss would skip. Remove lm_head from target_modules and "
            "modules_to_save of the PEFT configuration"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise TypeError(
            "model: expected an output head with a floating-point weight [V, H], got "
            f"{type(module).__name__}. Leave the head out of quantisation (skip lm_head)"
        )
    return module


def head_of(model: nn.Module) -> LMHead:
    """Read the head's weight, bias and multipliers from a Hugging Face causal LM."""
    module = head_module(model)
    scale, softcap = _multipliers(getattr(model, "config", None))
    return LMHead(
        weight=cast(Tensor, module.weight),
        bias=getattr(module, "bias", None),
        logit_scale=scale,
        softcap=softcap,
    )


def _multipliers(config: Any) -> tuple[float, float | None]:
    if config is None:
        return 1.0, None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    kind = getattr(config, "model_type", "")
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None and kind not in _SCALING_BEFORE_HEAD:
        scale *= float(scaling) if kind in _SCALING_MULTIPLIES else 1.0 / float(scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


@contextmanager
def at_head(model: nn.Module, use: Callable[[Tensor], Any]) -> Iterator[None]:
    """While this is open, calling `model` gives use(hidden) in place of the model's output.

    `use` runs inside the model's own forward, with the head's parameters as the wrapper (DDP, FSDP)
    made them available, and what it returns leaves through the model's output, where wrappers
    look for the tensors to differentiate. The model itself is unchanged afterwards.
    """
    found: list[Any] = []

    def enter_head(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        found.append(use(hidden))
        return (hidden[:, :0].detach(), *args[1:])

    def leave_model(module: nn.Module, args: tuple, output: Any) -> Any:
        if len(found) != 1:
            raise RuntimeError(
                f"model: expected {type(model).__name__} to call its output head once per forward, "
                f"it called it {len(found)} times"
            )
        return found.pop()

    handles = [
        head_module(model).register_forward_pre_hook(enter_head),
        # First among the hooks, so that a wrapper's own hook sees the tensors that matter.
        model.register_forward_hook(leave_model, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **more: Tensor,  # other inputs of the model, such as position_ids
) -> Tensor:  # (B, T, H), as they enter the head
    with at_head(model, lambda hidden: hidden):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more)


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: LMHead | None = None) -> float:
    """Compare `head` with the model's logits: the relative error, and an error beyond rounding.

    The head is fed its natural input, then the same made a hundred times larger: at their natural
    size the logits of a small model would hide a tanh.
    """
    head = head_of(model) if head is None else head
    vocab = head.weight.shape[0]
    input_ids = torch.arange(1, 9, device=head.weight.device)[None] % vocab
    was_training = model.training
    model.eval()
    try:
        worst = max(_head_error(model, head, input_ids, boost) for boost in (1.0, 100.0))
    finally:
        model.train(was_training)
    tolerance = _RELATIVE_TOLERANCE.get(head.weight.dtype, _HALF_TOLERANCE)
    if not worst <= tolerance:
        raise ValueError(
            f"model: expected logits = softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap) with "
            f"logit_scale={head.logit_scale:g} and softcap={head.softcap}, but the logits of "
            f"{type(model).__name__} differ by {worst:.3g} (relative; {tolerance:g} allowed). It "
            "multiplies or transforms its logits in a way this version does not know: please "
            "report the model's name, and do not train on it"
        )
    return worst


def _head_error(model: PreTrainedModel, head: LMHead, input_ids: Tensor, boost: float) -> float:
    seen: list[Tensor] = []

    def enter_head(module: nn.Module, args: tuple) -> tuple:
        seen.append(args[0] * boost)
        return (seen[-1], *args[1:])

    handle = head_module(model).register_forward_pre_hook(enter_head)
    try:
        theirs = model(input_ids=input_ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    ours = head.whole().logits(seen[-1]).float()
    if ours.shape != theirs.shape:
        return float("inf")
    scale = theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours - theirs).abs().max() / scale).item()
