"""Where a teacher's weights lie, and how they are loaded in full precision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from . import checks

_HALF = (torch.float16, torch.bfloat16)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint on disk that nothing is executed from, and how to load it in full precision."""

    path: Path
    dtype: torch.dtype | str = "auto"
    attn_implementation: str | None = None

    @classmethod
    def at(
        cls,
        path_or_name: str | Path,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
    ) -> StoredModel:
        """What lies at a path; of a hub's name, "owner/model", the files that are no code or
        pickle are fetched first, or found where an earlier fetch left them."""
        path = Path(path_or_name).expanduser()
        if not path.exists() and _HUB_NAME.fullmatch(str(path_or_name)):
            path = _fetched(str(path_or_name))
        return cls(path, dtype, attn_implementation)

    def __post_init__(self) -> None:
        """Raises FileNotFoundError where nothing is, ValueError for pickled weights or none."""
        if not self.path.exists():
            raise FileNotFoundError(
                f"path_or_model: expected a checkpoint or the hub's name of one (owner/model), got "
                f"{str(self.path)!r}, where nothing exists"
            )
        weights = any(self.path.glob("*.safetensors")) and (self.path / "config.json").is_file()
        if not weights and self.path.suffix != ".gguf":
            pickles = [p.name for s in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(s)]
            checks.fail("path_or_model", "a directory with config.json and *.safetensors, or a "
                        ".gguf file", ", ".join(pickles) or str(self.path), "a pickle can run code:"
                        " load it where you trust it, and save_pretrained it again" if pickles
                        else "")  # fmt: skip

    @property
    def quantised(self) -> bool:
        from .quant import is_quantized_checkpoint

        return is_quantized_checkpoint(self.path)

    def load(self, device: torch.device) -> PreTrainedModel:
        return load_whole(
            self.path,
            dtype=self.dtype,
            device_map={"": device},
            attn_implementation=self.attention_on(device),
        )

    def attention_on(self, device: torch.device) -> str | None:
        """What was asked for; else FlashAttention where this model, device and dtype have it."""
        possible = device.type == "cuda" and self.path.is_dir() and is_flash_attn_2_available()
        if self.attn_implementation is not None or not possible:
            return self.attn_implementation
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        half = (config.dtype if self.dtype == "auto" else self.dtype) in _HALF
        has_it = half and getattr(kind, "_supports_flash_attn", False)
        return "flash_attention_2" if has_it else None


def load_whole(path: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model from safetensors, without code that comes with it; raises where the
    checkpoint lacks weights, which would be drawn at random instead."""
    model, found = AutoModelForCausalLM.from_pretrained(
        str(path),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(found["missing_keys"]):
        checks.fail("path_or_model", f"all weights of {type(model).__name__} in {str(path)!r}",
                    f"{len(missing)} missing (first: {missing[0]})", "transformers would draw "
                    "them at random; is this the checkpoint of another architecture?")  # fmt: skip
    return model


def _fetched(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FETCHED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"path_or_model: expected a checkpoint or the hub's name of one, got {name!r}: there "
            f"is no such path, and the hub gave nothing ({reason})"
        ) from None
