"""Loads models from disk or the hub in full precision, without remote code and pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from ..quant.formats.checkpoint_gate import (
    as_checkpoint_error,
    load_config,
)
from ..quant.formats.conversion import check_all_used
from ..quant.formats.detect import check_stored_method, method_of
from ..quant.formats.file_names import ADAPTER, CONFIG, TOKENIZER
from ..quant.formats.header import check_header, keep_untied
from ..quant.formats.tensor_files import TensorFiles, read_json
from ..runtime import checks
from ..runtime.printable import printable
from .source import is_adapter, source_of

_HALF = (torch.float16, torch.bfloat16)
_DECIDED = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": True}
# Options of from_pretrained that a configuration does not take.
_NOT_OF_CONFIG = ("dtype", "torch_dtype", "quantization_config")
_METHODS = ("bitsandbytes", "gptq", "awq")  # transformers fetches kernels from the hub for others
_FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint on disk and how to load it in full precision, without running its code."""

    path: Path
    dtype: torch.dtype | str = "auto"
    attn_implementation: str | None = None
    adapter_base: str | Path | None = None  # the base of an adapter; None is the one that it names

    @classmethod
    def from_path(
        cls,
        path_or_name: str | Path,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        adapter_base: str | Path | None = None,
    ) -> StoredModel:
        """Return the checkpoint at a path or hub name, "owner/model".

        Hub files other than code and pickles are downloaded first, or taken from the hub cache."""
        source = source_of("path_or_model", path_or_name)
        path = fetched_folder(source.name) if source.kind == "hub" else source.path
        if source.kind in ("server", "cache"):
            got = f"{printable(source.name)}, a {source.kind} without weights"
            hint = "pass ServedTeacher(url) or TeacherCache(path) as the teacher"
            checks.fail("path_or_model", "the weights of a model", got, hint)
        return cls(path, dtype, attn_implementation, adapter_base)

    def __post_init__(self) -> None:
        """Raise FileNotFoundError if nothing is there, ValueError for pickled or no weights."""
        source_of("path_or_model", self.path)

    @property
    def is_adapter(self) -> bool:
        return source_of("path_or_model", self.path).kind == "adapter"

    @property
    def base(self) -> StoredModel:
        """The base model of an adapter; the model itself if it is no adapter.

        Raises:
            ValueError: the adapter names no base, or one that is quantized or an adapter itself.
            FileNotFoundError: the base is not there.
        """
        if not self.is_adapter:
            return self
        folder = printable(self.path.name)
        base_path = self.adapter_base or read_json(self.path / ADAPTER).get(
            "base_model_name_or_path"
        )
        if not base_path or not isinstance(base_path, (str, Path)):
            expected = f"the model under the adapter {folder}, which names none"
            hint = "pass base=, a path, if there is such an argument, or write it as "
            checks.fail("base", expected, "none", f"{hint}base_model_name_or_path into {ADAPTER}")
        try:
            base = StoredModel.from_path(base_path, self.dtype, self.attn_implementation)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"base: expected the model under the adapter {folder}, got "
                f"{printable(repr(str(base_path)))}, where none was found. Pass base=, a path "
                f"({error})"
            ) from None
        if base.is_adapter or base.is_quantized:
            expected = f"a whole model in full precision under the adapter {folder}"
            checks.fail("base", expected, printable(base_path), "merge the adapter into one")
        return base

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: this one, or that of an adapter's base."""
        has_tokenizer = any((self.path / name).is_file() for name in ("tokenizer.json", TOKENIZER))
        return self.base.path if self.is_adapter and not has_tokenizer else self.path

    @property
    def is_quantized(self) -> bool:
        from ..quant import is_quantized_checkpoint

        return not self.is_adapter and is_quantized_checkpoint(self.path)

    def load(self, device: torch.device) -> PreTrainedModel:
        """Return the model in full precision; an adapter is merged into its base."""
        if not self.is_adapter:
            return self.load_base(
                device_map={"": device}, attn_implementation=self.attention_on(device)
            )
        from .adapters import load_adapted, merge_adapter, read_adapter

        read_adapter(self.path)  # fails early, before the base is loaded
        adapted = load_adapted(self.base.load(device), self.path)
        with as_checkpoint_error(self.path, "an adapter that can be merged"):
            merged: PreTrainedModel = merge_adapter(adapted)
        return merged

    def load_base(self, **options: Any) -> PreTrainedModel:
        """Return the base model without adapter; options as for from_pretrained."""
        return load_whole(self.base.path, **{"dtype": self.dtype, **options})

    def attention_on(self, device: torch.device) -> str | None:
        """Return attn_implementation, or FlashAttention if model, device and dtype support it."""
        possible = device.type == "cuda" and self.path.is_dir() and is_flash_attn_2_available()
        if self.attn_implementation is not None or not possible:
            return self.attn_implementation
        config, _ = load_config(self.base.path)
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        half = (config.dtype if self.dtype == "auto" else self.dtype) in _HALF
        has_it = half and getattr(kind, "_supports_flash_attn", False)
        return "flash_attention_2" if has_it else None


def load_whole(path: str | Path, **options: Any) -> PreTrainedModel:
    """Return a causal language model from safetensors, without remote code.

    Args:
        path: a folder, or a name on the hub.
        options: for from_pretrained. A stored attention implementation is ignored.

    Raises:
        CheckpointError: files of the folder are damaged or link out of it, a stored tensor is
        unused, or a weight is missing, which transformers would initialize at random.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = StoredModel.from_path(path).path
    elif folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"path_or_model: expected *.safetensors in {folder}, got none. A pickle is not opened"
        )
    for name in _DECIDED:
        if options.get(name) not in (None, _DECIDED[name]):
            checks.fail(name, f"{_DECIDED[name]}, or none", repr(options[name]))
    options = {name: value for name, value in options.items() if name not in _DECIDED}
    if not folder.is_dir():
        expected = "a folder for a model in full precision"
        checks.fail("path_or_model", expected, folder, "load_teacher reads a .gguf file")
    if (folder / ADAPTER).exists():
        got = f"{folder}, which holds {ADAPTER} too"
        hint = "load the adapter's folder without a model in it"
        checks.fail("path_or_model", "a whole model", got, hint)
    files = TensorFiles(folder)
    model_options = {name: options.pop(name) for name in _NOT_OF_CONFIG if name in options}
    attention = options.get("attn_implementation")
    if not isinstance(config := options.pop("config", None), PretrainedConfig):
        config, options = load_config(folder, **options)
    options = {"attn_implementation": attention, **options, **model_options}
    if "quantization_config" not in options:
        _check_method(folder, config, files)
    is_plain = getattr(config, "quantization_config", None) is None
    shaped = is_plain and not options.get("ignore_mismatched_sizes")
    check_header(folder, config, files.names(), files if shaped else None, stored=files.bytes)
    with as_checkpoint_error(folder, "the weights of a causal language model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            output_loading_info=True,
            **_DECIDED,
            **options,
        )
    check_all_used(folder, model, info["unexpected_keys"], files)
    if missing := sorted(info["missing_keys"]):
        expected = f"all weights of {type(model).__name__} in {str(folder)!r}"
        got = f"{len(missing)} missing (first: {missing[0]})"
        hint = (
            "is it another architecture's checkpoint? transformers would initialize them at random"
        )
        checks.fail("path_or_model", expected, got, hint)
    keep_untied(model, model.get_expanded_tied_weights_keys(all_submodels=True))
    return model


def _check_method(folder: Path, config: Any, files: TensorFiles) -> None:
    """Raise ValueError for a quantization method that is unsupported or not the tensors'."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = method_of(stored if isinstance(stored, dict) else vars(stored))
    if method not in _METHODS:
        expected = f"full precision, or one of {', '.join(_METHODS)}"
        got = f"{folder} of quant_method {printable(repr(method))}"
        hint = "load_teacher reads other kinds; load another model and pass it"
        checks.fail("path_or_model", expected, got, hint)
    check_stored_method(files, read_json(folder / CONFIG))


def tokenizer_folder(path_or_name: str | Path) -> Path:
    """Return the folder with the tokenizer of a path or hub name, downloaded if needed."""
    path = Path(path_or_name).expanduser()
    if is_adapter(path):
        return StoredModel.from_path(path).tokenizer_folder
    if not path.exists() and source_of("tokenizer", path_or_name).kind == "hub":
        return fetched_folder(str(path_or_name), [p for p in _FETCHED if "tensors" not in p])
    return path


def fetched_folder(name: str, patterns: Sequence[str] = _FETCHED) -> Path:
    """Download the files of a hub model that match a pattern, and return their folder.

    Raises FileNotFoundError if neither the hub nor its local cache has the model."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise FileNotFoundError(
            f"path_or_model: expected a checkpoint or the hub's name of one, got {name!r}: there "
            f"is no such path, and the hub gave nothing ({reason})"
        ) from None
