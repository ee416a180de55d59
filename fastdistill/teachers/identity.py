"""The identity of a teacher and a tokenizer, as caches and servers store it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ..hf.offloading import named_tensors
from ..hf.tokenizers import tokenizer_fingerprint
from ..quant.linear import QuantizedWeight

_SAMPLED = 4096  # values of each tensor that enter the fingerprint, evenly spread


def identity_of(teacher: Any) -> dict[str, Any]:
    """Return name, configuration and weights digests of a teacher, as far as known.

    A teacher without a local model may have `identity`, a dict.
    """
    kind = type(teacher)
    identity: dict[str, Any] = {"kind": f"{kind.__module__}.{kind.__qualname__}"}
    model = getattr(teacher, "model", None)
    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        identity["name"] = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        identity["revision"] = getattr(config, "_commit_hash", None)
        identity["quantisation"] = getattr(teacher, "quant", None) or _quant_method(config)
        computes = {m.compute for m in model.modules() if isinstance(m, QuantizedWeight)}
        identity["compute"] = ", ".join(sorted(computes)) or None
        identity["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        identity["config_sha256"] = _config_digest(config)
        identity["weights_sha256"] = weights_digest(model)
    return {**identity, **dict(getattr(teacher, "identity", None) or {})}


def tokenizer_identity(tokenizer: Any) -> tuple[str | None, str | None]:
    """Return (sha256 of the token-to-id map, sha256 of the chat template), None if absent."""
    if tokenizer is None:
        return None, None
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = json.dumps(template, sort_keys=True)
    digest = None if not template else hashlib.sha256(str(template).encode()).hexdigest()
    return tokenizer_fingerprint(tokenizer), digest


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of shapes, dtypes and a sample of values of every tensor.

    It takes seconds, and checkpoints of one training run differ in it."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        sample = flat[::step].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config_digest(config: Any) -> str | None:
    if config is None:
        return None
    settings = config.to_dict()
    # Path and library version do not change the function.
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _quant_method(config: Any) -> str | None:
    method = getattr(config, "quantization_config", None)
    if method is None:
        return None
    settings = method if isinstance(method, dict) else method.to_dict()
    return str(settings.get("quant_method"))
