"""Loads models from disk or the hub in full precision, without remote code and pickles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from ..quant.formats.checkpoint_gate import (
    as_checkpoint_error,
    load_config,
)
from ..quant.formats.conversion import check_all_used
from ..quant.formats.detect import check_stored_method, method_of
from ..quant.formats.file_names import ADAPTER, CONFIG, TOKENIZER
from ..quant.formats.header import auto_class, check_header, keep_untied
from ..quant.formats.tensor_files import TensorFiles, read_json
from ..quant.formats.without_data import Headers, RemoteHeaders
from ..runtime import checks
from ..runtime.printable import printable
from .source import is_adapter, model_source, source_of

logger = logging.getLogger(__name__)

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
    role: str = field(default="path_or_model", compare=False)  # the argument that errors name

    @classmethod
    def from_path(
        cls,
        path_or_name: str | Path,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        adapter_base: str | Path | None = None,
        role: str = "path_or_model",
    ) -> StoredModel:
        """Return the checkpoint at a path or hub name, "owner/model".

        Hub files other than code and pickles are downloaded first, or taken from the hub cache."""
        source = model_source(role, path_or_name)
        path = fetched_folder(source.name, role=role) if source.kind == "hub" else source.path
        return cls(path, dtype, attn_implementation, adapter_base, role)

    def __post_init__(self) -> None:
        """Raise FileNotFoundError if nothing is there, ValueError for pickled or no weights."""
        source_of(self.role, self.path)

    @property
    def is_adapter(self) -> bool:
        return source_of(self.role, self.path).kind == "adapter"

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
        """Return the model in full precision: quantized weights expanded, an adapter merged."""
        if not self.is_adapter:
            attention = self.attention_on(device)
            # Under DeepSpeed's ZeRO-3, transformers would partition the model, or refuse a device.
            if self.path.is_dir() and not (self.is_quantized or is_deepspeed_zero3_enabled()):
                options: dict[str, Any] = {"attn_implementation": attention, "dtype": self.dtype}
                return load_whole(self.path, device_map={"": device}, **options)
            return self._load_expanded(device, attention)
        from .adapters import load_adapted, merge_adapter, read_adapter

        read_adapter(self.path)  # fails early, before the base is loaded
        adapted = load_adapted(self.base.load(device), self.path)
        with as_checkpoint_error(self.path, "an adapter that can be merged"):
            merged: PreTrainedModel = merge_adapter(adapted)
        return merged

    def load_base(self, **options: Any) -> PreTrainedModel:
        """Return the base model without adapter, to be trained; options as for from_pretrained.

        Layers of bitsandbytes, GPTQ and AWQ stay quantized, for adapters on them. Other formats,
        which transformers does not read, are expanded.
        """
        base = self.base
        if base.path.is_dir() and _method(load_config(base.path)[0]) in (None, *_METHODS):
            return load_whole(base.path, **{"dtype": self.dtype, **options})
        attention = options.pop("attn_implementation", self.attn_implementation)
        expanded = replace(base, dtype=options.pop("dtype", self.dtype))
        if options:
            expected = f"dtype and attn_implementation alone for {base.path.name}"
            checks.fail("model_init_kwargs", expected, ", ".join(options), "leave out the others")
        if base.is_quantized:
            logger.warning(
                "%s: expected %s in full precision, got quantized weights: training starts from "
                "their expanded values",
                *(self.role, printable(base.path.name)),
            )
        return expanded._load_expanded(torch.device("cpu"), attention)

    def _load_expanded(self, device: torch.device, attention: str | None) -> PreTrainedModel:
        from ..quant.loading import load_expanded

        return load_expanded(
            self.path, dtype=self.dtype, device=device, attn_implementation=attention
        )

    def attention_on(self, device: torch.device) -> str | None:
        """Return attn_implementation, or FlashAttention if model, device and dtype support it."""
        possible = device.type == "cuda" and self.path.is_dir() and is_flash_attn_2_available()
        if self.attn_implementation is not None or not possible:
            return self.attn_implementation
        config, _ = load_config(self.base.path)
        kind = auto_class(config)._model_mapping.get(type(config), None)
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
        model, info = auto_class(config).from_pretrained(
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
    method = _method(config)
    if method is None:
        return
    if method not in _METHODS:
        expected = f"full precision, or one of {', '.join(_METHODS)}"
        got = f"{folder} of quant_method {printable(repr(method))}"
        checks.fail("path_or_model", expected, got, "load another model and pass it")
    check_stored_method(files, read_json(folder / CONFIG))


def _method(config: Any) -> Any:
    """Return the quantization method that a configuration names; None for full precision."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return method_of(stored if isinstance(stored, dict) else vars(stored)) or "an unnamed one"


def config_folder(role: str, path_or_name: str | Path, hint: str = "") -> Path:
    """Return what `load_config` reads of a model, of an adapter's base, or of a config.json.

    Of a model on the hub, config.json alone is downloaded. Errors are those of `model_source`."""
    path = Path(path_or_name).expanduser()
    if is_adapter(path):
        return StoredModel.from_path(path, role=role).base.path
    is_config = path.suffix == ".json" and path.is_file()
    if is_config or (path / CONFIG).is_file():  # weights are not needed
        return path
    source = model_source(role, path_or_name, hint)
    return fetched_folder(source.name, (CONFIG,), role) if source.kind == "hub" else source.path


def tokenizer_folder(path_or_name: str | Path) -> Path:
    """Return the folder with the tokenizer of a path or hub name, downloaded if needed."""
    path = Path(path_or_name).expanduser()
    if is_adapter(path):
        return StoredModel.from_path(path, role="tokenizer").tokenizer_folder
    if not path.exists():
        name = model_source("tokenizer", path_or_name).name  # of the hub, as nothing is there
        return fetched_folder(name, [p for p in _FETCHED if "tensors" not in p], "tokenizer")
    return path


def hub_headers(name: str, role: str = "path_or_model") -> Headers:
    """Return the headers of a hub model's safetensors files; no weights are downloaded.

    Raises FileNotFoundError if neither the hub nor its local cache has them.
    """
    folder = fetched_folder(name, (CONFIG,), role)
    if any(folder.glob("model*.safetensors")):
        return Headers(folder)
    try:
        files = get_safetensors_metadata(name).files_metadata
    except Exception as error:  # of the hub, of its HTTP library, and of damaged headers
        reason = printable(str(error).strip().partition("\n")[0])
        raise FileNotFoundError(
            f"{role}: expected the headers of safetensors files of {name!r} on the hub, got "
            f"none ({reason}); download the model and pass its folder"
        ) from None
    tensors = {
        tensor: (file, str(info.dtype), tuple(info.shape))
        for file, header in files.items()
        for tensor, info in header.tensors.items()
    }
    metadata = {file: header.metadata for file, header in files.items()}
    size = sum(
        info.data_offsets[1] for header in files.values() for info in header.tensors.values()
    )
    return RemoteHeaders(folder, tensors, metadata, size)


def fetched_folder(
    name: str, patterns: Sequence[str] = _FETCHED, role: str = "path_or_model"
) -> Path:
    """Download the files of a hub model that match a pattern, and return their folder.

    Raises FileNotFoundError if neither the hub nor its local cache has the model."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise FileNotFoundError(
            f"{role}: expected a checkpoint or the hub's name of one, got {name!r}: there "
            f"is no such path, and the hub gave nothing ({reason})"
        ) from None
