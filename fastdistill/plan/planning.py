"""plan_memory: estimates memory, cache size and time, and proposes settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import checks
from ..cache.codec import BLOCK, bytes_per_token
from .memory import CONTEXT, DTYPES, FRAGMENTS, Planner, stored_dtype
from .optimisers import OPTIMIZERS
from .parts import Plan, Settings
from .proposal import propose
from .shapes import bytes_of, config_of, quantized_size, shapes_of
from .sizes import in_gb, read_bytes

DEVICES = ("cuda", "cpu")
BACKWARD = ("auto", "fused", "recompute")


def plan_memory(
    student: str | Path,
    teacher: str | Path | None = None,
    *,
    seq: int,
    batch: int = 1,
    accumulation: int = 1,
    k: int | None = 64,
    gpu: str | int | None = None,
    tokens: int | None = None,
    throughput: float | None = None,
    dtype: str | None = None,
    optim: str = "adamw_torch_fused",
    gradient_checkpointing: bool = False,
    backward: str = "auto",
    teacher_quant: str | None = None,
    cached: bool = False,
    lora_rank: int | None = None,
    device: str = "cuda",
) -> Plan:
    """Return the memory of a training run from config.json alone, without weights or a GPU.

    Args:
        student, teacher: a folder, a config.json, or a hub name; only the config.json is read.
        seq: tokens per row. batch: rows per micro-batch; several rows are assumed to be of unequal
            length. accumulation: micro-batches per update.
        k: number of the teacher's answers per position; None compares the whole vocabulary.
        gpu: memory of the GPU, "24GB" (10⁹), "24GiB" (2³⁰) or bytes. None makes no proposal.
        tokens: tokens of the dataset, for the size of a cache and the time of one epoch.
        throughput: measured tokens per second. Without it, no time is estimated.
        dtype: type of the student's weights, gradients and activations: "bfloat16", "float16",
            "float32". None is the trainer's default: "float32", or with lora_rank the stored
            dtype.
        optim: adamw_torch_fused, adamw_torch, adamw_8bit (adamw_bnb_8bit) or sgd.
        gradient_checkpointing, backward, lora_rank: as in training.
        teacher_quant: nf4, fp4, int4 or int8. cached: answers come from a cache, and no teacher is
            in memory.
        device: "cuda", or "cpu" for a run without a GPU.

    Returns:
        Plan; `peak` is the memory in torch's allocator of one process that holds the whole model.

    Raises:
        ValueError: an invalid argument, or a model whose forward pass reads the values of its
            inputs.
        ImportError: lora_rank without peft.
    """
    for name, count, least in (
        ("seq", seq, 2),
        ("batch", batch, 1),
        ("accumulation", accumulation, 1),
        ("k", k, 1),
        ("tokens", tokens, 1),
        ("lora_rank", lora_rank, 1),
    ):
        optional = name in ("k", "tokens", "lora_rank")
        if not (count is None and optional) and not _is_count(count, least):
            checks.fail(name, f"an integer of {least} or more", repr(count))
    for name, value, allowed in (
        ("dtype", dtype or "float32", tuple(DTYPES)),
        ("optim", optim, OPTIMIZERS),
        ("backward", backward, BACKWARD),
        ("device", device, DEVICES),
    ):
        checks.choice(name, value, allowed)
    if throughput is not None:
        checks.positive("throughput", throughput)
    for name, option in (("teacher_quant", teacher_quant), ("cached", cached or None)):
        if option is not None and teacher is None:
            checks.fail(name, "a teacher with this option", repr(option), "pass one with teacher=")
    if k is None and (teacher is None or cached):
        checks.fail(
            "k",
            "a number of answers without a teacher in memory",
            "None",
            "a cache cannot store the whole vocabulary",
        )
    card = None if gpu is None else read_bytes("gpu", gpu)
    student_config = config_of("student", student)
    if dtype is None:
        dtype = "float32" if lora_rank is None else stored_dtype(student_config)
    settings = Settings(
        seq=seq,
        batch=batch,
        accumulation=accumulation,
        k=k,
        dtype=dtype,
        optim=optim,
        gradient_checkpointing=gradient_checkpointing,
        backward=backward,
        teacher_quant=teacher_quant,
        cached=cached,
        lora_rank=lora_rank,
    )
    teacher_config = None if teacher is None else config_of("teacher", teacher)
    planner = Planner(student_config, teacher_config, device, card)
    return Plan(
        student=shapes_of(str(student), planner.student(dtype, None)),
        teacher=None if teacher is None else shapes_of(str(teacher), planner.teacher),
        memory=planner.memory(settings),
        activations=_activations(planner, settings),
        teacher_weights={} if teacher is None else _teacher_sizes(planner.teacher),
        cache_per_token=(per_token := _cache_per_token(planner, k)),
        cache=None if tokens is None or per_token is None else tokens * per_token,
        seconds=None if tokens is None or throughput is None else tokens / throughput,
        card=card,
        proposal=None if card is None else propose(planner, settings, card),
        assumptions=_assumptions(settings, device),
    )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _activations(planner: Planner, settings: Settings) -> dict[str, int]:
    sizes = {}
    for name, checkpointing in (("kept", False), ("checkpointed", True)):
        single_batch = replace(settings, gradient_checkpointing=checkpointing, accumulation=1)
        sizes[name] = planner.step(single_batch).activations
    return sizes


def _teacher_sizes(teacher: Any) -> dict[str, int]:
    dtype = str(next(teacher.parameters()).dtype).removeprefix("torch.")
    schemes = {
        scheme: quantized_size("teacher", teacher, scheme).weights for scheme in ("int8", "nf4")
    }
    return {dtype: bytes_of(teacher)} | schemes


def _cache_per_token(planner: Planner, k: int | None) -> int | None:
    """Return bytes per token of a cache at one temperature, as the codec stores them."""
    config = planner.configs["teacher"]
    if config is None or k is None:
        return None
    vocab = config.get_text_config().vocab_size
    return bytes_per_token(k, -(-vocab // BLOCK), 1)


def _assumptions(settings: Settings, device: str) -> tuple[str, ...]:
    rows = "rows of unequal length" if settings.batch > 1 else "rows without padding"
    lines = [f"one process; {rows}; all tokens are targets; fused attention"]
    if device == "cuda":
        lines.append(
            f"{in_gb(CONTEXT)} for the CUDA context and libraries, and {FRAGMENTS:.0%} of the peak "
            "for fragmentation"
        )
    return tuple(lines)
