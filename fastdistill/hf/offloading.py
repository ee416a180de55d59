"""Reads weights that accelerate offloads to CPU memory or disk.

accelerate replaces offloaded weights by meta tensors and loads each for its module's forward. What
is read outside that forward, mainly the output head, is loaded here in the same way. Weights that
are sharded over processes cannot be loaded by one process, and raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import checks

_SHARDED = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP"}


def resident(module: nn.Module, name: str) -> Any:
    """Return a parameter or buffer of a module, loaded if it is offloaded."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor) or not tensor.is_meta:
        return tensor
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        try:
            stored = None if weights is None else weights[name]
        except KeyError:
            continue
        if stored is not None:
            return stored.to(_execution_device(hook))
    return tensor


def resident_device(module: nn.Module) -> torch.device:
    """Return the device on which a module runs, also if its weight is offloaded."""
    weight: Any = module.weight
    hooks = _hooks(module) if weight.is_meta else []
    devices = [_execution_device(hook) for hook in hooks if getattr(hook, "offload", False)]
    return devices[0] if devices else torch.device(weight.device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads some of the weights."""
    return any(getattr(hook, "offload", False) for m in model.modules() for hook in _hooks(m))


def check_whole(role: str, model: nn.Module) -> None:
    """Raise ValueError for sharded weights, and for meta tensors that no hook loads."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        _fail_sharded(role, model, "DeepSpeed's ZeRO-3")
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDED:
                _fail_sharded(role, model, _SHARDED[kind.__name__])
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty and not is_offloaded(model):
        got = f"{len(empty)} without data (on the meta device; first: {empty[0]})"
        hint = "load them with from_pretrained, which offloads by hooks with a device_map"
        checks.fail(role, f"the weights of {type(model).__name__}", got, hint)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        part: Any = getattr(model, name, lambda: None)()
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta and resident(part, "weight").is_meta:
            part_name = name.removeprefix("get_")
            expected = f"{part_name} whose weights can be read outside their forward"
            hint = "give them a device of their own in device_map, or a smaller part to offload"
            checks.fail(role, expected, "ones offloaded with the modules around them", hint)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model's state_dict, loading offloaded ones one by one."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_meta:
            path, _, leaf = name.rpartition(".")
            tensor = resident(model.get_submodule(path), leaf)
        if isinstance(tensor, Tensor):
            yield name, tensor


def _fail_sharded(role: str, model: nn.Module, by: str) -> None:
    hint = (
        "load it once in each process, with quant= or a device_map that offloads where it does "
        "not fit, or behind fastdistill serve"
    )
    got = f"{type(model).__name__}, sharded by {by}"
    checks.fail(role, "a model whose weights are whole in this process", got, hint)


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _execution_device(hook: Any) -> torch.device:
    device = getattr(hook, "execution_device", None)
    if device is None:
        return torch.device("cpu")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
