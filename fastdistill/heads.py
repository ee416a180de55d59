"""The output head of a causal language model, and the hidden states that enter it.

Families differ in what happens around the head: Granite divides the logits, Cohere and Falcon-H1
multiply them, Gemma squashes them with tanh, GPT-J and Phi add a bias. None is patched here.
`at_head` watches one forward pass through the hooks of torch.nn.Module: it takes the hidden states
where they enter the head and lets the head itself see no position at all, so no logits exist.
`verify_head` compares with the model's own logits, so a multiplier that is not known here ends in
an error and never in a wrong loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from .offloading import resident, resident_device
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
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: expected one that is not compiled as a whole, got {type(model).__name__}: its "
            "hidden states are taken before the head, inside of what was compiled. Give the model "
            "from before torch.compile, and compile what is below the head: torch_compile=True for "
            "a student, model.base_model.compile() for a teacher"
        )
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
    return module


def head_of(model: nn.Module) -> LMHead:
    """Read the head's weight, bias and multipliers from a Hugging Face causal LM.

    Of a model that is sharded over processes, the weight is what is there now: the whole of it
    inside the head's own forward. An offloaded one is brought in.
    """
    module = head_module(model)
    weight = resident(module, "weight")
    plain = isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    if not plain and not is_partitioned(model):
        raise TypeError(
            "model: expected an output head with a floating-point weight [V, H], got "
            f"{type(module).__name__}. Leave the head out of quantization (skip lm_head)"
        )
    scale, softcap = _multipliers(getattr(model, "config", None))
    return LMHead(
        weight=weight,
        bias=resident(module, "bias"),
        logit_scale=scale,
        softcap=softcap,
    )


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters: empty but inside a module's forward."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def rows_of_head(model: nn.Module) -> int:
    """Columns of the logits, padding included."""
    weight: Any = head_module(model).weight
    return getattr(weight, "ds_shape", weight.shape)[0]


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

    `use` runs inside the model's own forward, with the head's parameters as the wrapper (DDP, FSDP,
    ZeRO) made them available, and what it returns (tensors, or tuples and dicts of them) leaves
    through the model's output, where wrappers look for the tensors to differentiate. The model
    itself is unchanged afterwards.
    """
    head, capture = head_module(model), _Capture()

    def enter_head(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        capture.put(use(hidden))
        # DTensor knows no shards of nothing: a head over several ranks sees one position.
        left = hidden[:1, :1] if is_dtensor(head.weight) else hidden[:, :0]
        return (left.detach(), *args[1:])

    def leave_model(module: nn.Module, args: tuple, output: Any) -> Any:
        if capture.calls != 1:
            raise RuntimeError(
                f"model: expected {type(model).__name__} to call its output head once per forward, "
                f"it called it {capture.calls} times"
            )
        return capture.result

    def after_wrappers(module: nn.Module, args: tuple, output: Any) -> Any:
        capture.update(output)
        return capture.take()

    handles = [
        head.register_forward_pre_hook(enter_head),
        # First among the hooks, so that a wrapper's own hook sees the tensors that matter.
        model.register_forward_hook(leave_model, prepend=True),
        model.register_forward_hook(after_wrappers),
    ]
    if is_partitioned(model):
        handles += _zero3_hooks(head, capture)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Capture:
    """What `use` returned in one forward pass."""

    def __init__(self) -> None:
        self.result: Any = None
        self.calls = 0

    def put(self, result: Any) -> None:
        self.result, self.calls = result, self.calls + 1

    def update(self, output: Any) -> None:
        """A wrapper's hooks have seen the result and may have put nodes of theirs behind its
        tensors. A copy in another type (FSDP's output_dtype) is not taken: the loss stays fp32."""
        ours, spec = tree_flatten(self.result)
        theirs = tree_flatten(output)[0]
        leaves = [
            b if isinstance(b, Tensor) and b.dtype == a.dtype else a
            for a, b in zip(ours, theirs, strict=True)
        ]
        self.result = tree_unflatten(leaves, spec)

    def take(self) -> Any:
        result, self.result, self.calls = self.result, None, 0
        return result


def _zero3_hooks(head: nn.Module, capture: _Capture) -> list[Any]:
    """ZeRO-3 gathers a module's weights again for its backward when the gradient reaches what left
    the module. Of the head that is what `use` returned: its hooks are shown that, and the model
    then gets the logits (of no position) all the same."""
    logits: list[Any] = []

    def return_result(module: nn.Module, args: tuple, output: Any) -> Any:
        logits.append(output)
        return capture.result

    def return_logits(module: nn.Module, args: tuple, output: Any) -> Any:
        capture.update(output)
        return logits.pop()

    return [
        head.register_forward_hook(return_result, prepend=True),
        head.register_forward_hook(return_logits),
    ]


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    **more: Tensor,  # other inputs of the model, such as position_ids
) -> Tensor:  # (B, T, H), as they enter the head
    def use(hidden: Tensor) -> Tensor:
        check_positions(model, hidden, input_ids)
        return hidden

    with at_head(model, use):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more)


def check_positions(model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
    """Raise ValueError where the head sees another number of positions than the row has tokens."""
    if hidden.shape[:2] == input_ids.shape:
        return
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in _adapter_configs(model)}
    reached = list(hidden.shape[:2])
    raise ValueError(
        f"model: expected one position per token, {list(input_ids.shape)}, at the output head of "
        f"{type(model).__name__}, got {', '.join(sorted(kinds)) or reached}: it puts tokens of its "
        f"own among the row's ({reached} reach the head), as "
        "prompt-learning adapters and models that expand an image token do, and other positions "
        "would be compared. Use adapters on the model's layers, such as LoraConfig"
    )


def _adapter_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module then gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generation_settings(model: Any, settings: Any) -> Iterator[None]:
    """While this is open, no module of `model` has other generation settings than these.

    What a call of `generate` leaves open, transformers fills from the model's own settings, and
    PEFT hands those of one module to another: afterwards each module has its own again.
    """
    name, missing = "generation_config", object()
    own = [(module, vars(module).get(name, missing)) for module in model.modules()]
    for module, before in own:
        if before is not missing or module is model:
            setattr(module, name, settings)
    try:
        yield
    finally:
        for module, before in own:
            if before is not missing:
                setattr(module, name, before)
            else:
                vars(module).pop(name, None)


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: LMHead | None = None) -> float:
    """Compare `head` with the model's logits: the relative error, and an error beyond rounding.

    The head is fed its natural input, then the same made a hundred times larger: at their natural
    size the logits of a small model would hide a tanh.
    """
    device = resident_device(head_module(model))
    input_ids = torch.arange(1, 9, device=device)[None] % rows_of_head(model)
    with evaluating(model):
        worst = max(_head_error(model, head, input_ids, boost) for boost in (1.0, 100.0))
    head = head_of(model) if head is None else head
    tolerance = _RELATIVE_TOLERANCE.get(head.weight.dtype, _HALF_TOLERANCE)
    if math.isnan(worst):
        raise ValueError(
            f"model: expected finite logits, got NaN or infinity from {type(model).__name__} for "
            f"the tokens {input_ids[0].tolist()}. Its weights are NaN, infinite, or too large for "
            f"{str(head.weight.dtype).removeprefix('torch.')}"
        )
    if not worst <= tolerance:
        raise ValueError(
            f"model: expected logits = softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap) with "
            f"logit_scale={head.logit_scale:g} and softcap={head.softcap}, but the logits of "
            f"{type(model).__name__} differ by {worst:.3g} (relative; {tolerance:g} allowed). It "
            "multiplies or transforms its logits in a way this version does not know: please "
            "report the model's name, and do not train on it"
        )
    return worst


def _head_error(
    model: PreTrainedModel, head: LMHead | None, input_ids: Tensor, boost: float
) -> float:
    captured: list[Tensor] = []

    def enter_head(module: nn.Module, args: tuple) -> tuple:
        hidden = args[0] * boost
        captured.append((head_of(model) if head is None else head).whole().logits(hidden).float())
        return (hidden, *args[1:])

    handle = head_module(model).register_forward_pre_hook(enter_head)
    try:
        theirs = model(input_ids=input_ids, use_cache=False).logits.float()
    except (TypeError, ValueError) as error:
        raise ValueError(
            "model: expected one that reads token ids alone, without other inputs, but "
            f"{type(model).__name__} raised {type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
    ours = captured[-1]
    check_positions(model, ours, input_ids)
    if ours.shape != theirs.shape:
        return float("inf")
    scale = theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours - theirs).abs().max() / scale).item()
