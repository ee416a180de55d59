"""Loads, adapts and compiles the student, and runs its forward pass up to the output head."""

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

from ..hf.adapters import load_adapted
from ..hf.checkpoint import StoredModel
from ..hf.lm_head import LMHead, at_head, check_positions, evaluating, head_of
from ..hf.offloading import is_offloaded
from ..hf.row_reader import can_pack
from ..hf.source import is_adapter
from ..runtime.optional import require
from ..runtime.printable import printable
from .config import DistillConfig
from .router_loss import router_coefficient, warn_without_router_loss
from .targets import Targets

logger = logging.getLogger(__name__)

_COMPILE_OPTIONS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
_SHORT_ROW = 512  # tokens; the longest row of benchmarks/attention.py


def prepare_student(
    model: PreTrainedModel | str | Path, config: DistillConfig, peft_config: Any
) -> nn.Module:
    """Return the model to train, loaded if it is a path, with adapters if peft_config is set.

    Raises:
        ValueError, TypeError: the loss cannot be computed at the model's head.
    """
    if isinstance(model, (str, Path)):
        options = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]
        adapted = is_adapter(model)
        if not {"dtype", "torch_dtype"} & options.keys():
            # Weights under adapters do not change, so they keep their stored precision.
            whole = peft_config is None and not adapted
            options["dtype"] = config.dtype or ("float32" if whole else "auto")
        dtype: Any = options.get("dtype", options.get("torch_dtype"))
        stored = StoredModel.from_path(
            model,
            getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype,
            attn_implementation=options.pop("attn_implementation", None),
            role="model",
        )
        options.setdefault("attn_implementation", _attention(stored, config))
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


def _attention(stored: StoredModel, config: DistillConfig) -> str | None:
    """Return the attention of a student: eager for bfloat16 on a CPU if all rows are short.

    The choice does not depend on the time that it takes here, so that a run can be repeated.
    """
    known_short = not config.packing and (config.max_length or _SHORT_ROW + 1) <= _SHORT_ROW
    if stored.attn_implementation or not (
        config.device.type == "cpu" and config.bf16 and known_short
    ):
        return stored.attention_on(config.device)
    logger.info(
        "attn_implementation: eager, which is faster than sdpa for bf16=True on a CPU and rows of "
        "at most %d tokens; pass model_init_kwargs={'attn_implementation': 'sdpa'} for the other",
        _SHORT_ROW,
    )
    return "eager"


def prepare_loaded(model: Any, config: DistillConfig, peft_config: Any) -> nn.Module:
    """Return a loaded model, with adapters if peft_config is set.

    The model may be on the meta device. Raises as `prepare_student` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a causal language model, or its path, got {type(model).__name__}"
        )
    if is_offloaded(model):
        raise ValueError(
            "model: expected weights that stay in memory during training, got weights offloaded by "
            "accelerate. Load the student without device_map"
        )
    router_coefficient(model)  # raises without one
    head_of(model)  # raises for an adapted or quantized head
    _keep_differentiable(model)
    if peft_config is not None:
        model = _adapted(model, peft_config)
    if is_adapted(model):
        _check_inside_layers(model)
        head_of(model)
        if getattr(config, "activation_checkpointing", False) or config.gradient_checkpointing:
            # Reentrant checkpoints need an input that requires a gradient.
            model.enable_input_require_grads()
    _warn_of_16_bits(model)
    if not is_adapted(model):
        warn_without_router_loss(model)
    prepared: nn.Module = model
    return prepared


def _warn_of_16_bits(model: nn.Module) -> None:
    trained = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point()}
    for dtype in sorted(trained & {torch.float16, torch.bfloat16}, key=str):
        logger.warning(
            "The student's weights are %s without a float32 copy: updates smaller than half a step "
            "of a weight are lost. Load it in float32 (and compute in bfloat16 with bf16=True).",
            str(dtype).removeprefix("torch."),
        )


def _keep_differentiable(model: nn.Module) -> None:
    """Disable a bitsandbytes kernel whose backward pass is wrong on CPUs with AVX512-BF16.

    It repacks the weights of a 4-bit layer at the first forward in evaluation mode, but its
    backward reads the old layout, so gradients are noise (0.50.2). The other kernel has one layout.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if getattr(module, name, False):
            setattr(module, name, False)
            module.state_dict()  # restores weights that an earlier evaluation repacked


def _adapted(model: Any, peft_config: Any) -> nn.Module:
    peft = require("peft", "peft_config", "'fastdistill[peft]'")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            "peft_config: expected a peft.PeftConfig such as LoraConfig, got "
            f"{type(peft_config).__name__}"
        )
    if is_adapted(model):
        raise ValueError(
            "peft_config: expected None with a model that already has adapters, got another "
            "configuration. Merge the existing adapters, or omit peft_config"
        )
    adapted: nn.Module = peft.get_peft_model(model, peft_config)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def without_adapters(model: nn.Module) -> Any:
    """Return the transformers model inside of its adapters."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def is_stored_otherwise(model: Any) -> bool:
    """Return whether transformers stores weights in another form than in memory.

    It does so for the experts of a mixture, for example.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:  # this version of transformers stores weights as they are in memory
            return False
        is_ours = isinstance(model, PreTrainedModel)
        conversions = get_model_conversion_mapping(model, add_legacy=False) if is_ours else None
    return bool(conversions)


def load_stored(model: Any, folder: Path) -> None:
    """Load a folder's weights into a model in memory with transformers' conversions.

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
    """Raise ValueError for weights that the checkpoint or the student lacks."""
    for names, words in ((missing, "lacks"), (unexpected, "has, and the student lacks,")):
        if listed := sorted(names):
            names = ", ".join(listed[:4]) + (", …" if len(listed) > 4 else "")
            raise ValueError(f"it {words} {len(listed)} weights: {printable(names)}")


def check_adapter(model: Any, folder: Path) -> None:
    """Raise ValueError unless checkpoint and student have the same adapter, or none.

    peft itself ignores unknown weights.
    """
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
    """Raise ValueError for prompt-learning adapters: they are outside of the inner model.

    The student samples and is compiled as the transformers model inside.
    """
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise ValueError(
                f"peft_config: expected adapters on the model's layers, such as LoraConfig, got "
                f"{kind}: it adds tokens before the row, outside of the layers"
            )


@contextmanager
def compiled_by_us(config: DistillConfig) -> Iterator[None]:
    """Hide torch_compile while the Trainer is built.

    Otherwise Accelerate would compile the whole model, including the loss.
    """
    compile_options = {name: getattr(config, name) for name in _COMPILE_OPTIONS}
    config.torch_compile = False
    config.torch_compile_backend = config.torch_compile_mode = None
    try:
        yield
    finally:
        for name, value in compile_options.items():
            setattr(config, name, value)


def compile_body(model: nn.Module, config: DistillConfig) -> None:
    """Compile everything below the head in place.

    Hooks at the head compute the loss in eager mode. Compiling them would trace the model again
    for every batch.
    """
    body = without_adapters(model).base_model
    body.compile(backend=config.torch_compile_backend or "inductor", mode=config.torch_compile_mode)


def check_packable(model: nn.Module) -> None:
    """Raise ValueError if the sequences of a packed row would affect each other."""
    with evaluating(model):
        is_packable = can_pack(model)  # with its adapters: some take no positions
    if not is_packable:
        raise ValueError(
            f"packing: expected False for {type(without_adapters(model)).__name__}, got True: its "
            "layers carry a state or their own positions along the row, so a sequence would affect "
            "the next one"
        )


@contextmanager
def student_at_head(
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: Targets,
    use: Callable[[Tensor, LMHead], Any],
    *,
    packed: bool = False,
    valid_vocab: int | None = None,
    finish: Callable[[Any, Any], Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Make the student return use(hidden states at the targets [N, H], head), in this context.

    Args:
        model: gets the hooks. The module to call, with the inputs that this yields, may wrap it
            (DDP, FSDP).
        packed: run the attended tokens in one row [1, Σ lengths], with positions that restart.
        valid_vocab: the head's rows from this one on are padding.
        finish: as in `at_head`; a mixture whose router's loss is computed needs it.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    inputs, sources = {"input_ids": ids, "attention_mask": mask}, targets.sources
    if packed:
        attended = mask.bool()
        positions = mask.long().cumsum(-1) - 1
        sources = (attended.view(-1).long().cumsum(0) - 1)[sources]
        inputs = {"input_ids": ids[attended][None], "position_ids": positions[attended][None]}
    inputs |= batch.get("images", {})  # none with packed rows
    options: dict[str, Any] = {} if finish is None else {"finish": finish}
    if router_coefficient(without_adapters(model)) is not None:
        inputs["output_router_logits"] = finish is not None

    def at_targets(hidden: Tensor) -> tuple[Tensor, LMHead]:
        check_positions(model, hidden, inputs["input_ids"])
        rows = hidden.flatten(0, 1)
        # If every position is a target, avoid a copy of the hidden states.
        all_targets = len(sources) == len(rows)
        head = head_of(model)._replace(valid_vocab=valid_vocab)
        return rows if all_targets else rows[sources], head

    with at_head(model, use, at_targets, **options):
        yield {**inputs, "use_cache": False}
