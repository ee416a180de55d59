"""The output head of a causal language model, and the hidden states that enter it.

Model families differ around the head: Granite divides the logits, Cohere and Falcon-H1 multiply
them, Gemma soft-caps them with tanh, GPT-J and Phi add a bias. No model code is patched. `at_head`
uses the hooks of torch.nn.Module in one forward pass: it captures the hidden states at the head's
input and passes the head no positions, so no logits are computed. `verify_head` compares with the
model's own logits, so an unknown multiplier raises an error instead of giving a wrong loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..kernels.head import LMHead as LMHead
from ..losses.vocab_parallel import is_dtensor
from .offloading import resident, resident_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# `logits_scaling` multiplies in these models and divides in all others.
_SCALING_MULTIPLIES = frozenset({"hyperclovax", "hyperclovax_vision_v2"})
# These divide the hidden states before the head, so the hook already gets them divided.
_SCALING_BEFORE_HEAD = frozenset({"minicpm3"})

_RELATIVE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2


def head_module(model: nn.Module) -> nn.Module:
    """Return the module that maps hidden states to logits; raise if an adapter wraps it."""
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: expected one that is not compiled as a whole, got {type(model).__name__}: its "
            "hidden states are read at the head, inside the compiled graph. Pass the uncompiled "
            "model, and compile only the layers below the head: torch_compile=True for a student, "
            "model.base_model.compile() for a teacher"
        )
    find = getattr(model, "get_output_embeddings", None)
    module: nn.Module | None = find() if callable(find) else None
    if module is None:
        raise TypeError(
            "model: expected a causal language model with get_output_embeddings(), got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM"
        )
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise ValueError(
            f"model: expected a plain output head, got {type(module).__name__}: the loss would "
            "skip an adapter on lm_head. Remove lm_head from target_modules and modules_to_save "
            "of the PEFT configuration"
        )
    return module


def head_of(model: nn.Module) -> LMHead:
    """Return the head's weight, bias and multipliers of a Hugging Face causal LM.

    A sharded weight is returned in its current state: gathered only inside the head's forward. An
    offloaded weight is loaded.
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
    """Whether DeepSpeed ZeRO-3 partitions the parameters, which are empty outside a forward."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def rows_of_head(model: nn.Module) -> int:
    """Return the number of logits, padding included."""
    weight: Any = head_module(model).weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


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
def at_head(
    model: nn.Module,
    use: Callable[..., Any],
    arguments: Callable[[Tensor], tuple[Any, ...]] = lambda hidden: (hidden,),
    finish: Callable[[Any, Any], Any] = lambda result, output: result,
) -> Iterator[None]:
    """Make `model(...)` return use(*arguments(hidden)) instead of its output, in this context.

    `use` runs inside the model's forward, where the wrapper (DDP, FSDP, ZeRO) has made the head's
    parameters available. Its result (tensors, or tuples and dicts of them) becomes the model's
    output, where wrappers look for the tensors to differentiate. The model is unchanged afterwards.
    `finish(result, output)` may add parts of the model's own output to the result of `use`, and
    returns it.
    """
    head, capture = head_module(model), _Capture()

    def enter_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        capture.put(use(*arguments(hidden)))
        # DTensor cannot shard empty tensors: a head over several ranks gets one position.
        left = hidden[:1, :1] if is_dtensor(head.weight) else hidden[:, :0]
        return (left.detach(), *args[1:])

    def leave_model(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if capture.calls != 1:
            raise RuntimeError(
                f"model: expected {type(model).__name__} to call its output head once per forward, "
                f"it called it {capture.calls} times"
            )
        capture.result = finish(capture.result, output)
        return capture.result

    def after_wrappers(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        capture.update(output)
        return capture.take()

    handles = [
        head.register_forward_pre_hook(enter_head),
        # First, so that a wrapper's own hooks get the tensors to differentiate.
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
    """Holds the result of `use` during one forward pass."""

    def __init__(self) -> None:
        self.result: Any = None
        self.calls = 0

    def put(self, result: Any) -> None:
        self.result, self.calls = result, self.calls + 1

    def update(self, output: Any) -> None:
        """Take over the tensors that a wrapper's hooks returned, which may have new graph nodes.

        A copy in another dtype (FSDP's output_dtype) is ignored: the loss stays fp32."""
        current, spec = tree_flatten(self.result)
        returned = tree_flatten(output)[0]
        leaves = [
            b if isinstance(b, Tensor) and b.dtype == a.dtype else a
            for a, b in zip(current, returned, strict=True)
        ]
        self.result = tree_unflatten(leaves, spec)

    def take(self) -> Any:
        result, self.result, self.calls = self.result, None, 0
        return result


def _zero3_hooks(head: nn.Module, capture: _Capture) -> list[Any]:
    """Register hooks that show the result of `use` to ZeRO-3 as the head's output.

    ZeRO-3 gathers a module's weights for backward when the gradient reaches the module's output.
    The model itself still gets the (empty) logits."""
    logits: list[Any] = []

    def return_result(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits.append(output)
        return capture.result

    def return_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
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
    **inputs: Tensor,  # other inputs of the model, such as position_ids
) -> Tensor:  # (B, T, H), as they enter the head
    def use(hidden: Tensor) -> Tensor:
        check_positions(model, hidden, input_ids)
        return hidden

    with at_head(model, use):
        states: Tensor = model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
        )
        return states


def check_positions(model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
    """Raise ValueError if the head gets another number of positions than there are tokens."""
    if hidden.shape[:2] == input_ids.shape:
        return
    adapters = getattr(model, "peft_config", None)
    configs = adapters.values() if isinstance(adapters, dict) else ()
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs}
    reached = list(hidden.shape[:2])
    raise ValueError(
        f"model: expected one position per token, {list(input_ids.shape)}, at the output head of "
        f"{type(model).__name__}, got {', '.join(sorted(kinds)) or reached}: it inserts tokens "
        f"into the row ({reached} reach the head), as prompt-learning adapters and models that "
        "expand an image token do, so positions would not match. Use adapters on the model's "
        "layers, such as LoraConfig"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode within this context; restore each module's mode after."""
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
    """Give all modules of `model` these generation settings within this context.

    transformers fills settings that `generate` leaves open from the model's, and PEFT copies them
    between modules. Each module's settings are restored afterwards.
    """
    name, missing = "generation_config", object()
    previous = [(module, vars(module).get(name, missing)) for module in model.modules()]
    for module, before in previous:
        if before is not missing or module is model:
            setattr(module, name, settings)
    try:
        yield
    finally:
        for module, before in previous:
            if before is not missing:
                setattr(module, name, before)
            else:
                vars(module).pop(name, None)


@torch.no_grad()
def verify_head(model: PreTrainedModel, head: LMHead | None = None) -> float:
    """Return the relative error of `head` to the model's logits; raise if it exceeds rounding.

    The head gets its usual input, and the same times 100: at its usual scale a small model's logits
    would hide a tanh.
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
            "transforms its logits in a way this version does not support: please report the "
            "model's name, and do not train on it"
        )
    return worst


def _head_error(
    model: PreTrainedModel, head: LMHead | None, input_ids: Tensor, boost: float
) -> float:
    captured: list[Tensor] = []

    def enter_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] * boost
        captured.append((head_of(model) if head is None else head).whole().logits(hidden).float())
        return (hidden, *args[1:])

    handle = head_module(model).register_forward_pre_hook(enter_head)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
    except (TypeError, ValueError) as error:
        raise ValueError(
            "model: expected one that reads token ids alone, without other inputs, but "
            f"{type(model).__name__} raised {type(error).__name__}: {error}"
        ) from error
    finally:
        handle.remove()
    computed = captured[-1]
    check_positions(model, computed, input_ids)
    if computed.shape != logits.shape:
        return float("inf")
    scale = logits.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((computed - logits).abs().max() / scale)
