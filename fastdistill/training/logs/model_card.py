"""Writes the README.md of a trained student: teacher, objective and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.atomic_files import write_atomically
from ...runtime.backend import describe
from ...runtime.version import __version__
from ...teachers.mapped import MappedTeacher
from ..config import DistillConfig
from ..loss import Loss
from .first_batch import Panel

_EVALUATED = {
    "eval_kl": "KL(teacher ‖ student), {compared}, nats per token",
    "eval_agreement": "same most likely token as the teacher",
    "eval_teacher_mass": "teacher's mass on its k tokens",
    "eval_student_mass": "student's mass on them",
    "eval_acceptance_rate": "acceptance rate of speculative decoding, {compared}",
    "eval_nll": "negative log-likelihood of the text, nats per token",
    "eval_perplexity": "perplexity",
    "eval_top1": "accuracy of the next token",
}
_OURS = "Trained with fastdistill's DistillTrainer."


def has_other_readme(folder: Path) -> bool:
    """Return whether a folder has a README.md that this module did not write."""
    try:
        return _OURS not in (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False


def write_card(
    folder: Path,
    config: DistillConfig,
    loss: Any,
    student: Any,
    teacher: Any,
    panel: Panel | None,
    state: Any,
) -> None:
    """Write README.md in `folder`, with the metadata that the Hugging Face hub reads.

    Args:
        loss: the loss that was minimized, the configured Loss or a custom one.
        student: the transformers model without adapters.
        state: the trainer's state, for its log.
    """
    name = name_of(student)
    rows = [("teacher", describe_teacher(teacher)), *_objective(config, loss)]
    if panel is not None:
        rows.append(("covered teacher mass, first batch", panel.mass_text()))
    trained = _last(state.log_history, "teacher_mass")
    if trained is not None:
        rows.append(("covered teacher mass, last log", f"{trained['teacher_mass']:.4f} mean"))
    rows.append(("steps", f"{state.global_step:,}"))
    lines = [
        "---",
        *([] if name is None else [f"base_model: {name}"]),
        *("library_name: transformers", "tags:", "- fastdistill", "- distillation", "---", ""),
        "# Distilled model" if name is None else f"# {name}, distilled",
        "",
        _OURS,
        "",
        *_table(rows),
    ]
    last = _last(state.log_history, "eval_loss")
    if last is not None:
        compared = "whole vocabulary" if config.k is None else f"top {config.k} and tail"
        metrics = [
            (label.format(compared=compared), f"{last[name]:.4g}")
            for name, label in _EVALUATED.items()
            if name in last
        ]
        lines += ["", f"## Evaluation, step {last.get('step', 0):,}", "", *_table(metrics)]
    versions = describe()["packages"]
    used = [f"{n} {versions[n]}" for n in ("torch", "transformers", "peft") if versions.get(n)]
    lines += ["", ", ".join([f"fastdistill {__version__}", *used]) + ".", ""]
    write_atomically(folder / "README.md", "\n".join(lines))


def name_of(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def describe_teacher(teacher: Any) -> str:
    if teacher is None:
        return "none: the labels alone"
    if isinstance(teacher, MappedTeacher):
        return f"{describe_teacher(teacher.teacher)}, with another tokenizer"
    name = getattr(teacher, "name", None) or name_of(getattr(teacher, "model", None))
    label = name or f"{type(getattr(teacher, 'model', teacher)).__name__}, given as an object"
    quant = getattr(teacher, "quant", None)
    return label if quant is None else f"{label}, quantised to {quant}"


def _objective(config: DistillConfig, loss: Any) -> list[tuple[str, str]]:
    values = config.to_dict()
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    trained = ("learning rate", f"{config.learning_rate:g}, {schedule}")
    if not isinstance(loss, Loss):
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        return [("loss", f"{name}, given as an object"), trained]
    k = "the whole vocabulary" if config.k is None else f"{config.k} tokens per position"
    is_relevant = {
        "beta": config.divergence == "jsd",
        "skew": config.divergence.startswith("skew"),
        "eta": config.divergence == "lk_hybrid",
        "support": config.support != "teacher",
        "tail": config.k is not None,
        "temperature": True,
        "t2_scale": config.t2_scale,
        "ce_weight": config.ce_weight > 0,
        "z_loss": config.z_loss > 0,
        "lmbda": config.lmbda > 0,
        "token_selection": config.token_selection is not None,
    }
    return [
        ("divergence", config.divergence),
        ("compared", k),
        *((name, str(values[name])) for name, is_listed in is_relevant.items() if is_listed),
        trained,
    ]


def _last(history: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((entry for entry in reversed(history) if name in entry), None)


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
