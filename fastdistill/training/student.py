"""The student: how it is loaded, adapted and compiled, and how its forward meets the loss."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters import load_adapted
from ..heads import LMHead, at_head, check_positions, evaluating, head_of
from ..offloading import is_offloaded
from ..packing import can_pack
from ..resolve import is_adapter
from ..runtime.printable import printable
from ..stored_model import StoredModel
from .config import DistillConfig
from .targets import Targets

logger = logging.getLogger(__name__)

_COMPILE_OPTIONS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def prepare_student(
    model: PreTrainedModel | str | Path, config: DistillConfig, peft_config: Any
) -> nn.Module:
    """The model to train: loaded from a path, with adapters around it where peft_config is given.

    Raises ValueError or TypeError for a model whose loss cannot be taken at its head.
    """
    if isinstance(model, (str, Path)):
        options = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
        adapted = is_adapter(model)
        if not {"dtype", "torch_dtype"} & options.keys():
            # Weights under adapters do not move, and need no more precision than they have.
            whole = peft_config is None and not adapted
            options["dtype"] = config.dtype or ("float32" if whole else "auto")
        dtype: Any = options.get("dtype", options.get("torch_dtype"))
        stored = StoredModel.at(
            model,
            getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype,
            attn_implementation=options.pop("attn_implementation", None),
        )
        options.setdefault("attn_implementation", stored.attention_on(config.device))
        model = stored.load_base(**options)
        if stored.is_adapter:
            model = load_adapted(model, stored.path, trainable=True)
    elif config.model_init_kwargs:
        raise ValueError(
            "model_init_kwargs: expected None with a model that is loaded already, got "
            f"{config.model_init_kwargs!r}"
        )
    elif config.dtype is not None:
        raise ValueError(
            f"dtype: expected None with a model that is loaded already, got {config.dtype!r}"
        )
    return prepare_loaded(model, config, peft_config)


def prepare_loaded(model: Any, config: DistillConfig, peft_config: Any) -> nn.Module:
    """The model that is there, with adapters around it where peft_config is given.

    It may be on the meta device. Raises as `prepare` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a causal language model, or its path, got {type(model).__name__}"
        )
    if is_offloaded(model):
        raise ValueError(
            "model: expected weights that stay in memory while they train, got some that are "
            "offloaded by accelerate. Load the student without device_map"
        )
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "model: expected config.output_router_logits=False, got True: the router's loss "
            "would be dropped, since the loss is taken at the output head"
        )
    head_of(model)  # an adapted or quantised head is refused before anything is built
    _keep_differentiable(model)
    if peft_config is not None:
        model = _adapted(model, peft_config)
    if is_adapted(model):
        _check_inside_layers(model)
        head_of(model)
        if getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing:
            # Reentrant checkpoints pass gradients on only where an input asks for one.
            model.enable_input_require_grads()
    _warn_of_16_bits(model)
    return model


def _warn_of_16_bits(model: nn.Module) -> None:
    trained = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point()}
    for dtype in sorted(trained & {torch.float16, torch.bfloat16}, key=str):
        logger.warning(
            "The student's weights are %s without a copy in float32: an update that is smaller "
            "than half a step of a weight vanishes. Load it in float32 (and compute in bfloat16 "
            "with bf16=True).",
            str(dtype).removeprefix("torch."),
        )


def _keep_differentiable(model: nn.Module) -> None:
    """bitsandbytes on a CPU with AVX512-BF16 repacks a 4-bit layer's weights at its first forward
    in evaluation mode, and its backward reads them as if it had not: gradients are then noise
    (0.50.2). Its other kernel knows one layout only."""
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if getattr(module, name, False):
            setattr(module, name, False)
            module.state_dict()  # puts back what an earlier evaluation repacked


def _adapted(model: Any, peft_config: Any) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ImportError("peft_config: expected peft to be installed (pip install peft)") from None
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            "peft_config: expected a peft.PeftConfig such as LoraConfig, got "
            f"{type(peft_config).__name__}"
        )
    if is_adapted(model):
        raise ValueError(
            "peft_config: expected None with a model that has adapters already, got another "
            "configuration. Merge the first ones, or leave peft_config out"
        )
    return peft.get_peft_model(model, peft_config)


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def is_stored_otherwise(model: Any) -> bool:
    """Return whether transformers stores weights under other names or in another form than they
    have in memory, as it does with the experts of a mixture."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # a transformers that stores what is in memory
            return False
        is_ours = isinstance(model, PreTrainedModel)
        conversions = get_model_conversion_mapping(model, add_legacy=False) if is_ours else None
    return bool(conversions)


def load_stored(model: Any, folder: Path) -> None:
    """Load the weights in a folder into a model in memory, through transformers' conversions.

    Raises:
        ValueError: the folder lacks a weight of the model, or has another one.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1}
    loaded, report = type(model).from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=functools.reduce(torch.promote_types, kinds, torch.bfloat16),
        output_loading_info=True,
    )
    check_keys(report["missing_keys"], report["unexpected_keys"])
    model.load_state_dict(loaded.state_dict())


def check_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ValueError for weights that a checkpoint lacks, or that the student has not."""
    for names, words in ((missing, "lacks"), (unexpected, "has, and the student has not,")):
        if listed := sorted(names):
            names = ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
            raise ValueError(f"it {words} {len(listed)} weights: {printable(names)}")


def check_adapter(model: Any, folder: Path) -> None:
    """Raise ValueError if a checkpoint has an adapter and the student has none or another one, or
    the reverse. peft passes over weights that it does not know."""
    file = folder / "adapter_model.safetensors"
    has_adapter = (folder / "adapter_config.json").exists()
    deeper = any(folder.glob("*/adapter_config.json"))  # of several adapters
    if has_adapter != is_adapted(model) and not deeper:
        words = ("an adapter", "whole weights")
        raise ValueError(f"it has {words[not has_adapter]}, the student {words[has_adapter]}")
    if has_adapter and is_adapted(model) and file.exists():
        import peft

        name = model.active_adapters[0]
        own = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        with safe_open(file, "pt") as weights:
            stored = {key for key in weights.keys() if "embed" not in key or key in own}  # noqa: SIM118
        check_keys(own.keys() - stored, stored - own.keys())


def _check_inside_layers(model: Any) -> None:
    """Raise for adapters in front of the model: a student samples and is compiled as the
    transformers model inside, which would be without them."""
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise ValueError(
                f"peft_config: expected adapters on the model's layers, such as LoraConfig, got "
                f"{kind}: it puts tokens of its own before the row's, outside of the layers"
            )


@contextmanager
def compiled_by_us(config: DistillConfig) -> Iterator[None]:
    """While the Trainer is built it does not see torch_compile: Accelerate would compile the whole
    model, with the loss in it."""
    compile_options = {name: getattr(config, name) for name in _COMPILE_OPTIONS}
    config.torch_compile = False
    config.torch_compile_backend = config.torch_compile_mode = None
    try:
        yield
    finally:
        for name, value in compile_options.items():
            setattr(config, name, value)


def compile_body(model: nn.Module, config: DistillConfig) -> None:
    """torch.compile for everything below the head, in place.

    The loss is taken by hooks at the head, in eager mode around a compiled body: compiled with
    them, the model would be traced anew for every batch.
    """
    body = without_adapters(model).base_model
    body.compile(backend=config.torch_compile_backend or "inductor", mode=config.torch_compile_mode)


def check_packable(model: nn.Module) -> None:
    with evaluating(model):
        is_packable = can_pack(model)  # with its adapters: some take no positions
    if not is_packable:
        raise ValueError(
            f"packing: expected False for {type(without_adapters(model)).__name__}: its layers "
            "carry something along the row (a state, or positions of their own), so that one "
            "sequence would be seen by the next"
        )


def forward_to_head(
    wrapped: nn.Module,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    targets: Targets,
    use: Callable[[Tensor, LMHead], Any],
    *,
    packed: bool,
) -> Any:
    """use(hidden at the targets [N, H], head), called inside the student's forward.

    `wrapped` is what is called (DDP, FSDP); `model` is the one inside, where hooks belong. With
    `packed` the attended tokens run in one row [1, Σ lengths], apart by positions that restart.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs, sources = {"input_ids": ids, "attention_mask": mask}, targets.sources
    if packed:
        attended = mask.bool()
        positions = mask.long().cumsum(-1) - 1
        sources = (attended.view(-1).long().cumsum(0) - 1)[sources]
        inputs = {"input_ids": ids[attended][None], "position_ids": positions[attended][None]}

    def at_targets(hidden: Tensor) -> Any:
        check_positions(model, hidden, inputs["input_ids"])
        rows = hidden.flatten(0, 1)
        # All positions in order are a view: no copy of the hidden states.
        everywhere = len(sources) == len(rows)
        return use(rows if everywhere else rows[sources], head_of(model))

    with at_head(model, at_targets):
        return wrapped(**inputs, use_cache=False)
