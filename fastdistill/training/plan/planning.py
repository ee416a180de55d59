"""plan_memory: estimates memory, cache size and time, and proposes settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...hf.checkpoint import hub_headers
from ...quant import is_quantized_checkpoint
from ...quant.loading import load_shapes
from ...runtime import checks
from ...teachers.cache.codec import BLOCK, bytes_per_token
from .memory import CONTEXT, FRAGMENTS, Planner, stored_dtype
from .proposal import propose
from .shapes import bytes_of, config_of, quantized_size, shapes_of
from .sizes import in_gb, read_bytes
from .types import Plan, Settings


def plan_memory(
    student: str | Path,
    teacher: str | Path | None = None,
    *,
    settings: Settings,
    gpu: str | int | None = None,
    tokens: int | None = None,
    throughput: float | None = None,
    device: str = "cuda",
) -> Plan:
    """Return the memory of a training run from config.json alone, without weights or a GPU.

    Args:
        student, teacher: a folder, a config.json, a hub name or a .gguf file; only the config.json
            and, of a quantized teacher, the headers of its weights are read. It is counted as it is
            loaded. Without those headers (a config.json alone, a hub that is out of reach) it is
            counted as in full precision, without teacher_quant; the plan says so.
        settings: of the run.
        gpu: memory of the GPU, "24GB" (10⁹), "24GiB" (2³⁰) or bytes. None makes no proposal, and
            the loss takes the chunks of a GPU of 64 GiB or more.
        tokens: tokens of the dataset, for the size of a cache and the time of one epoch.
        throughput: measured tokens per second. Without it, no time is estimated.
        device: "cuda", or "cpu" for a run without a GPU.

    Returns:
        Plan; `peak` is the memory in torch's allocator of one process that holds the whole model.

    Raises:
        ValueError: an invalid argument, or a model whose forward pass reads the values of its
            inputs.
        ImportError: lora_rank without peft.
    """
    checks.integer("tokens", tokens, 1, optional=True)
    checks.positive("throughput", throughput, optional=True)
    checks.choice("device", device, ("cuda", "cpu"))
    for name, default in (("teacher_quant", None), ("cached", False), ("support", "teacher")):
        option = getattr(settings, name)
        if option != default and teacher is None:
            checks.fail(name, "a teacher with this option", repr(option), "pass one with teacher=")
    if settings.k is None and (teacher is None or settings.cached):
        checks.fail(
            "k",
            "a number of answers without a teacher in memory",
            "None",
            "a cache cannot store the whole vocabulary",
        )
    card = None if gpu is None else read_bytes("gpu", gpu)
    student_config = config_of("student", student)
    if settings.dtype is None:
        dtype = "float32" if settings.lora_rank is None else stored_dtype(student_config)
        settings = replace(settings, dtype=dtype)
    teacher_config = None if teacher is None else config_of("teacher", teacher)
    packed = None if teacher is None or settings.cached else _packed(teacher, teacher_config)
    planner = Planner(student_config, teacher_config, device, card, packed)
    student_shapes = shapes_of(str(student), planner.student(settings.dtype, None))
    teacher_shapes = None if teacher is None else shapes_of(str(teacher), planner.teacher)
    single, per_token = replace(settings, accumulation=1), None
    if teacher_config is not None and settings.stored_topk is not None:
        blocks = -(-teacher_config.get_text_config().vocab_size // BLOCK)
        per_token = bytes_per_token(settings.stored_topk, blocks, 1)  # at one temperature
    return Plan(
        student=student_shapes,
        teacher=teacher_shapes,
        memory=planner.memory(settings),
        activations={
            name: planner.step(replace(single, gradient_checkpointing=on)).activations
            for name, on in (("kept", False), ("checkpointed", True))
        },
        teacher_weights={} if teacher is None else _teacher_sizes(planner),
        cache_per_token=per_token,
        cache=None if tokens is None or per_token is None else tokens * per_token,
        seconds=None if tokens is None or throughput is None else tokens / throughput,
        card=card,
        proposal=None if card is None else propose(planner, settings, card),
        assumptions=_assumptions(
            settings, device, packed is None and _is_quantized(teacher_config)
        ),
    )


def _packed(teacher: str | Path, config: Any) -> Any:
    """Return a quantized teacher without data; None for full precision, or without headers."""
    path = Path(teacher).expanduser()
    if path.is_file() or any(path.glob("*.gguf")) or any(path.glob("*.safetensors")):
        return load_shapes(path) if is_quantized_checkpoint(path) else None
    if path.exists() or not _is_quantized(config):
        return None
    try:
        return load_shapes(hub_headers(str(teacher), "teacher"))
    except FileNotFoundError:
        return None


def _teacher_sizes(planner: Planner) -> dict[str, int]:
    if planner.packed is not None:
        return {"as stored": bytes_of(planner.packed)}
    teacher = planner.teacher
    dtype = str(next(teacher.parameters()).dtype).removeprefix("torch.")
    schemes = {scheme: quantized_size(teacher, scheme).weights for scheme in ("int8", "nf4")}
    return {dtype: bytes_of(teacher)} | schemes


def _is_quantized(config: Any) -> bool:
    """Return whether a configuration is that of quantized weights."""
    return getattr(config, "quantization_config", None) is not None


def _assumptions(settings: Settings, device: str, quantized: bool) -> tuple[str, ...]:
    rows = "rows of unequal length" if settings.batch > 1 else "rows without padding"
    lines = [f"one process; {rows}; all tokens are targets; fused attention"]
    if quantized and settings.teacher_quant is None and not settings.cached:
        lines.append(
            "the quantized teacher is counted as in full precision: the headers of its weights "
            "were not found"
        )
    if device == "cuda":
        lines.append(
            f"{in_gb(CONTEXT)} for the CUDA context and libraries, and {FRAGMENTS:.0%} of the peak "
            "for fragmentation"
        )
    return tuple(lines)
