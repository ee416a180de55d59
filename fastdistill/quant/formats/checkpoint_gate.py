"""Checks a checkpoint before transformers or tokenizers read it.

A folder is checked first: no file links out of it, its JSON files parse, and nothing in it names
other weight files or a class that is no tokenizer. transformers is then called without network and
remote code. A configuration may name implementations of attention and experts, which may be kernels
on the hub. They are ignored: the caller chooses how to compute. Errors of transformers become a
CheckpointError that names the folder.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ...runtime.printable import printable
from .file_names import CONFIG, TOKENIZER
from .gguf import read_gguf
from .gguf_header import read_headers
from .tensor_files import PICKLE_SUFFIXES, CheckpointError, check_inside, fail_entry, read_json

TEMPLATES = "additional_chat_templates"
# Documents that no library opens.
DOCUMENTS = (".md", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".log")
_OBJECTS = (
    CONFIG,
    TOKENIZER,
    "tokenizer.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
)
# Of these tokenizers prints unknown names to stderr as they are.
_PRINTED = (TOKENIZER, "special_tokens_map.json")
_OTHER_FILES = ("configuration_files", "transformers_weights", "fusion_config")
# The caller also chooses a model's output options.
_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
_DTYPES = ("dtype", "torch_dtype")
_PANIC = "PanicException"  # of Rust libraries; no subclass of Exception, and not importable
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts?|labels)$")
_MAX_MODULES = {"layer": 1 << 12, "block": 1 << 12}  # modules are built one by one
_MAX_OTHERS = 1 << 16
_ROTARY, _LARGEST_ROTARY = ("rope_theta", "rotary_emb_base", "factor"), 1e30
_NAMES = re.compile(r"[\w.\-]*")
_MODULES = re.compile(r"[\w.\-]*(\*[\w.\-]*){0,2}")  # "model.layers.*.self_attn" of gpt-oss
_LINK = "model.gguf"
_NO_TOKENIZER = ("none", "no_vocab")  # of llama.cpp
_TRIAL = "Is this a text? 1 + 2 = 3."


@contextlib.contextmanager
def as_checkpoint_error(source: Path, expected: str) -> Iterator[None]:
    """Turn a library's error about a checkpoint into a CheckpointError that names it.

    OSError, MemoryError and ImportError pass through unchanged.
    """
    try:
        yield
    except (CheckpointError, OSError, MemoryError, ImportError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = f"{type(error).__name__}: {printable(error, 1000)}"
        raise CheckpointError(
            f"{source}: expected {expected}, got {reason}; the file is damaged, or the checkpoint "
            "is of another version: download it again"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for a file that links out of a folder or for invalid JSON."""
    with as_checkpoint_error(folder, "a folder that can be listed"):
        entries = [*folder.iterdir(), *(folder / TEMPLATES).glob("*")]
    for path in sorted(entries):
        unread = (*DOCUMENTS, *PICKLE_SUFFIXES)
        if not path.is_dir() and path.suffix.lower() not in unread:
            check_inside(folder, path)
    for name in _OBJECTS:
        if (folder / name).exists():
            stored = read_json(folder / name)
            if name in _PRINTED:
                _check_names(folder / name, stored)


def _check_names(file: Path, value: Any) -> None:
    """Raise CheckpointError for a name in an object that acts on a terminal."""
    if isinstance(value, dict):
        for name in value:
            if not name.isprintable():
                expected = "a name of printable characters, as the library tokenizers prints it"
                fail_entry(file, name, expected, name)
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_names(file, part)


def load_config(source: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return (the configuration of a folder, config.json or .gguf file, the unused options).

    Args:
        source: the folder, or the file.
        options: as for AutoConfig.from_pretrained; they override stored entries.

    Raises:
        CheckpointError: it is damaged, of a model that transformers does not know, or it names code
        or other files. FileNotFoundError: there is no configuration.
    """
    source = Path(source)
    if source.is_file() and source.suffix == ".gguf":
        with as_checkpoint_error(source, "the configuration of a model that transformers knows"):
            return AutoConfig.for_model(**read_gguf(source).config, **options), {}
    file = source / CONFIG if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(f"{source}: expected {CONFIG} in this folder, got none")
    if source.is_dir():
        check_folder(source)
    stored = read_json(file)
    check_choices(file, stored)
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = "custom code that comes with a checkpoint is never run (trust_remote_code)"
        fail_entry(file, "model_type", "a model that transformers knows", kind, hint)
    with as_checkpoint_error(file, "the configuration of a model that transformers knows"):
        config, unused = AutoConfig.from_pretrained(
            str(source),
            trust_remote_code=False,
            local_files_only=True,
            return_unused_kwargs=True,
            **options,
        )
    for part in _parts_of(config):
        for name, value in _OUTPUTS.items():
            if hasattr(part, name) and name not in options:
                setattr(part, name, value)
    # These setters also set the sub-configurations.
    config._attn_implementation = options.get("attn_implementation")
    config._experts_implementation = options.get("experts_implementation")
    return config, unused


def _parts_of(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts_of(part)


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer in a folder or a .gguf file, without remote code and downloads.

    Raises:
        CheckpointError: its files are damaged, link out of the folder, or name a class that is no
        tokenizer. OSError: there is none. ImportError: an older transformers needs the package gguf
        for the tokenizer of a .gguf file.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix == ".gguf":
        return _gguf_tokenizer(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with a tokenizer, got none")
    check_folder(folder)
    for name in (CONFIG, TOKENIZER):
        if (folder / name).is_file():
            _check_tokenizer_class(folder / name)
    with as_checkpoint_error(folder, "a tokenizer that transformers can read"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder.as_posix(), trust_remote_code=False, local_files_only=True
        )
    _try(folder, tokenizer)
    return tokenizer


def _try(source: Path, tokenizer: Any) -> None:
    with as_checkpoint_error(source, "a tokenizer that can read and write text"):
        tokenizer.decode(tokenizer(_TRIAL)["input_ids"])


def _gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer that transformers makes of a .gguf file, with its chat template.

    transformers would also read the configuration of a tokenizer in its folder, which may be of
    another model. So it is shown a folder with a link to the file alone. AutoTokenizer would read
    the file's vocabulary three times, to choose a class for what is in the file anyway."""
    header = read_headers(file)
    file = header.files[0].resolve()
    if header.fields.get("tokenizer.ggml.model") in (None, *_NO_TOKENIZER):
        raise FileNotFoundError(f"{file}: expected a tokenizer (tokenizer.ggml.model), got none")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _LINK).symlink_to(file)
        expected = "a tokenizer that transformers can read, unless one is passed as tokenizer="
        with as_checkpoint_error(file, expected):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder, gguf_file=_LINK, local_files_only=True
            )
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(file)
    _try(file, tokenizer)
    return tokenizer


def _check_tokenizer_class(file: Path) -> None:
    """Check tokenizer_class: transformers accepts any of its classes, even ones that unpickle."""
    stored = read_json(file)
    if file.name == CONFIG:
        check_choices(file, stored)
    if inputs := stored.get("init_inputs"):
        fail_entry(file, "init_inputs", "none", inputs, "they may be files outside the folder")
    name = stored.get("tokenizer_class")
    if name is None:
        return
    words = isinstance(name, str) and _NAMES.fullmatch(name) is not None
    for candidate in (name, f"{name}Fast") if words else ():
        with as_checkpoint_error(file, "a tokenizer_class"):
            kind = tokenizer_class_from_name(candidate)
        # A class whose package is not installed is a dummy, which raises when it is used.
        is_dummy = type(kind).__name__ == "DummyObject"
        is_tokenizer = isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)
        words = words and (kind is None or is_dummy or is_tokenizer)
    if not words:
        expected = "the name of a tokenizer of transformers"
        fail_entry(file, "tokenizer_class", expected, name)


def check_choices(file: Path, value: Any, at: str = "") -> None:
    """Raise CheckpointError if a configuration names code or files, or cannot be built."""
    if isinstance(value, list):
        for part in value:
            check_choices(file, part, at)
    elif isinstance(value, dict):
        for key, part in value.items():
            name = f"{at}.{key}" if at else key
            _check_entry(file, key, name, part)
            check_choices(file, part, name)
    elif isinstance(value, float) and math.isnan(value):
        fail_entry(file, at, "a number", "NaN")
    elif type(value) is int and abs(value) >= 1 << 63:
        fail_entry(file, at, "a number of 64 bits", f"one of {value.bit_length()}")


def _check_entry(file: Path, key: str, name: str, value: Any) -> None:
    if key in _OTHER_FILES and value:
        fail_entry(file, name, "none", value, "it replaces files or code that were checked")
    elif key in _DTYPES and value not in (None, "auto"):
        stored = str(value).removeprefix("torch.")
        is_dtype = isinstance(getattr(torch, stored, None), torch.dtype)
        if not isinstance(value, dict) and not is_dtype:
            fail_entry(file, name, "the name of a torch.dtype", value)
    elif _COUNT.search(key) and type(value) is int:
        limit = next((n for part, n in _MAX_MODULES.items() if part in key), _MAX_OTHERS)
        least = -limit if key == "vision_feature_layer" else -1  # LLaVA counts it from the end
        if not least <= value <= limit:
            fail_entry(file, name, f"a number in 0..{limit}", value)
    elif key in _ROTARY and type(value) in (int, float):
        if not 0 < value < _LARGEST_ROTARY:
            fail_entry(file, name, f"a number above 0 and below {_LARGEST_ROTARY:g}", value)
    elif key.endswith(("modules", "modules_to_not_convert")) and isinstance(value, list):
        # Libraries use them as regular expressions, which may backtrack without end.
        for entry in value:
            if isinstance(entry, str) and not _MODULES.fullmatch(entry):
                fail_entry(file, name, "names of modules", entry)
