"""Definition and helpers of all operators: empty tensors for None, fp32, shapes of gradients.

Operators return tensors only; one that was not requested is empty (numel 0). The tensors among
their arguments are positional, the scalars keyword-only: an operator unpacks them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from .namespace import NAMESPACE

library = torch.library.Library(NAMESPACE, "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # the Python function of each operator

# The scalars of an LM head and of a loss, in the schemas of the operators.
HEAD = "float logit_scale, float? softcap, SymInt? valid_vocab, float temperature"
LOSS = (
    "str divergence, float beta, float skew, float eta, str tail, bool t2_scale, float ce_weight, "
    "float z_loss"
)


def define_operator(schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator NAMESPACE::`schema` and return it.

    torch.library.custom_op does the same, but its first call imports torch._dynamo, which takes
    seconds.

    Args:
        body: the implementation on every device; torch.compile does not trace it.
        fake: returns empty outputs, for tracing.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _skip_tracing(body)
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    BODIES[name] = body
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _skip_tracing(body: Callable[..., Any]) -> None:
    """Keep torch.compile out of `body` and what it calls, as torch.compiler.disable does.

    That one wraps the function, and imports torch._dynamo at the first call.
    """
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(body.__code__, eval_frame._FrameExecStrategy(skip, skip))


def or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def or_none(value: Tensor) -> Tensor | None:
    return value if value.numel() else None


def select_needed(grads: Iterable[Tensor | None], need: Iterable[bool]) -> list[Tensor | None]:
    """The requested gradients; None for the others."""
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def full_precision(tensor: Tensor) -> Any:
    """Turn autocast off: operands are cast once, at the public boundary."""
    return torch.autocast(tensor.device.type, enabled=False)


def accumulator(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def needed_by(ctx: Any) -> list[bool]:
    """Which of hidden, weight and bias (the first inputs of an operator) need a gradient."""
    return [bool(n) for n in ctx.needs_input_grad[:3]]


def fake_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if need[0] else hidden.new_empty(0),
        torch.empty_like(weight) if need[1] else hidden.new_empty(0),
        torch.empty_like(bias) if need[2] and bias is not None else hidden.new_empty(0),
    )
