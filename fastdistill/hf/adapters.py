"""Loads PEFT adapters from disk: checks them, attaches them to a model, merges them.

peft treats module names as regular expressions, allocates what the configuration asks for, and
imports modules that it names. So adapter_config.json is checked here first: regular expressions are
matched in bounded time, and peft gets the names that they match; counts are bounded by the stored
tensors; and the adapter is built once on the meta device and compared with the header of its
weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quant.formats.checkpoint_gate import as_checkpoint_error, check_folder
from ..quant.formats.file_names import ADAPTER
from ..quant.formats.header import keep_untied
from ..quant.formats.tensor_files import (
    TensorFiles,
    check_inside,
    fail_checkpoint,
    fail_entry,
    read_json,
)
from ..runtime.bounded_regex import BoundedPattern, PatternError
from ..runtime.optional import require
from ..runtime.printable import printable
from .source import ADAPTER_WEIGHTS as WEIGHTS

# peft matches these against module names; a leading ^ is the only pattern that peft itself writes.
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "target_parameters",
    "feedforward_modules",
)
_NAME = re.compile(r"\^?[\w.\-]*")
_MAX_LENGTH, _MAX_NAMES = 500, 1 << 16
_ALL_LINEAR = "all-linear"
# Of these a text is one regular expression, and each key of those: over a module's whole name.
_EXPRESSIONS = ("target_modules", "exclude_modules", "feedforward_modules")
_KEYED = ("rank_pattern", "alpha_pattern", "lambda_pattern")
# These name a module to import, other adapters to load, or files to read.
_REFUSED = ("megatron_config", "arrow_config", "corda_config", "eva_config", "lora_ga_config")
_DROPPED = ("auto_mapping", "runtime_config")  # used only when peft loads the base model
_INITIAL = ("init_lora_weights", "init_weights", "init_ia3_weights")
_ITERATIONS = re.compile(r"pissa_niter_(\d+)")
_MAX_ITERATIONS = 64
_OTHER_BASE = "is it one of another base?"


def load_adapted(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """Return a model with the adapter of a folder as a PeftModel, frozen unless `trainable`.

    Raises:
        CheckpointError: the adapter is damaged or of another base, some of its weights are missing
        or unused, or its configuration has a refused entry.
        ImportError: peft is not installed.
    """
    config, files = read_adapter(folder)
    from peft import PeftModel

    _name_modules(model, config, folder / ADAPTER)
    _check_weights(model, config, files)
    with as_checkpoint_error(folder, "an adapter that peft can put onto its base"):
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)


def merge_adapter(adapted: Any) -> Any:
    """Return the base model with the adapter merged into its weights.

    Tied weights are untied first if the adapter changes one of their modules. Otherwise the merge
    would change the other modules too, or be applied twice.
    """
    _part_shared(adapted)
    model = adapted.merge_and_unload()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in dict(tied).items():
        if model.get_parameter(name) is not model.get_parameter(source):
            del tied[name]
            keep_untied(model, [name])
    return model


def _part_shared(adapted: Any) -> None:
    """Untie the weights of modules under an adapter; of all modules if layers are replicated.

    Trained embedding rows (TrainableTokensLayer) apply to all modules that share the embedding, and
    stay tied.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapted.active_peft_config
    repeated = bool(getattr(config, "layer_replication", None))
    tuned = [
        module.get_base_layer()
        for module in adapted.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    ]
    owners: dict[int, int] = {}
    for module in adapted.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in adapted.modules() if repeated else tuned:
        for name, parameter in module._parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                owners[id(parameter)] -= 1
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = own


def read_adapter(folder: Path) -> tuple[Any, TensorFiles]:
    """Return (the adapter's checked PeftConfig, its weights)."""
    peft = require("peft.mapping", "path", "'fastdistill[peft]'")
    check_folder(folder)
    file, weights = folder / ADAPTER, folder / WEIGHTS
    if not weights.is_file():
        hint = "a pickle can run code: save the adapter again from where you trust it"
        fail_checkpoint("path", f"{WEIGHTS} in {folder.name}", "none", hint)
    check_inside(folder, weights)
    files = TensorFiles(weights)
    stored = read_json(file)
    kinds = {
        str(kind.value): kind
        for kind, tuner in peft.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if hasattr(tuner, "merge_and_unload")
    }
    kind = stored.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        expected = f"one of {', '.join(sorted(kinds))}, which can be merged"
        fail_entry(file, "peft_type", expected, kind)
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kinds[str(kind)]]
    known = {entry.name for entry in dataclasses.fields(config_class)}
    values = {name: value for name, value in stored.items() if name not in _DROPPED}
    for name, value in values.items():
        if name not in known and value not in (None, False, "", [], {}):
            fail_entry(file, name, f"an entry of a {config_class.__name__}", value, "update peft")
        _check_value(file, name, value, files)
    values = {name: value for name, value in values.items() if name in known}
    with as_checkpoint_error(file, f"a {config_class.__name__}"):
        return config_class(**values), files


def _check_value(file: Path, name: str, value: Any, files: TensorFiles) -> None:
    if name in _REFUSED and value:
        fail_entry(file, name, "none", value)
    _check_numbers(file, name, value)
    if name in _EXPRESSIONS and isinstance(value, str):
        _matched(file, name, value)
    elif name in _PATTERNS and value is not None:
        for part in value if isinstance(value, (list, dict)) else [value]:
            if not _is_name(part):
                expected = f"names of modules, or {_ALL_LINEAR!r}"
                hint = "a regular expression may never end: list the names of the modules"
                fail_entry(file, name, expected, part, hint)
    if name.endswith("_pattern") and name not in _PATTERNS and value is not None:
        if not isinstance(value, dict):
            fail_entry(file, name, "names of modules with a number each", value)
        for part in value:
            if name in _KEYED and not _is_name(part):
                _matched(file, name, _as_key(part))
            elif not _is_name(part):
                hint = "a regular expression may never end"
                fail_entry(file, name, "names of modules", part, hint)
    if isinstance(value, (list, dict)) and len(value) > _MAX_NAMES:
        fail_entry(file, name, f"at most {_MAX_NAMES:,} entries", f"{len(value):,}")
    if name == "layer_replication" and value is not None:
        _check_replication(file, value, len(files.names()))


def _check_numbers(file: Path, name: str, value: Any) -> None:
    """Raise CheckpointError for NaN and infinity, and for too many iterations."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(file, name, part)
        if isinstance(value, dict) and "loftq_iter" in value:
            _check_iterations(file, name, value["loftq_iter"])
    elif isinstance(value, float) and not math.isfinite(value):
        fail_entry(file, name, "a finite number", value)
    elif name in _INITIAL and isinstance(value, str) and (count := _ITERATIONS.fullmatch(value)):
        _check_iterations(file, name, int(count[1][:9]))


def _check_iterations(file: Path, name: str, count: Any) -> None:
    if type(count) is not int or not 0 <= count <= _MAX_ITERATIONS:
        fail_entry(file, name, f"at most {_MAX_ITERATIONS} iterations", count)


def _name_modules(model: nn.Module, config: Any, file: Path) -> None:
    """Replace every regular expression by the names of the model's modules that it matches."""
    names = [name for name, _ in model.named_modules() if name]
    for field in _EXPRESSIONS:
        expression = getattr(config, field, None)
        if not isinstance(expression, str) or expression == _ALL_LINEAR:
            continue
        matched = _matched(file, field, expression, names)
        if not matched and field == "target_modules":
            expected = f"names of modules of {type(model).__name__}"
            fail_entry(file, field, expected, expression, "it matches none")
        listed = field != "feedforward_modules" and not _has_endings(names, matched)
        setattr(config, field, (set(matched) if listed else _either(matched)) if matched else None)
    for field in _KEYED:
        numbers = getattr(config, field, None) or {}
        if not all(map(_is_name, numbers)):
            exact = {}
            for key, number in numbers.items():
                if _is_name(key):
                    exact[key] = number
                elif matched := _matched(file, field, _as_key(key), names):
                    exact[f"^{_either(matched)}"] = number
                else:
                    warnings.warn(
                        f"{file}: {field}: {printable(repr(key))} matches no module of "
                        "the base and is not used",
                        stacklevel=2,
                    )
            setattr(config, field, exact)


def _matched(file: Path, field: str, expression: str, names: Iterable[str] = ()) -> list[str]:
    """Return the names that an expression matches; raise CheckpointError if that may not end."""
    try:
        pattern = BoundedPattern(expression)
        return [name for name in names if pattern.matches(name)]
    except PatternError as error:
        expected = "names of modules, or a regular expression that is sure to end"
        fail_entry(file, field, expected, expression, f"{error}. List the names of the modules")


def _as_key(key: str) -> str:
    """Return the expression that peft makes of a key of a rank_pattern, without its end."""
    return rf"(.*\.)?({key})"


def _either(names: list[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _has_endings(names: list[str], matched: list[str]) -> bool:
    """Return whether a list of the matched names would match other modules too, by its endings."""
    endings = set(matched)
    others = (name.split(".") for name in names if name not in endings)
    return any(".".join(parts[i:]) in endings for parts in others for i in range(1, len(parts)))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_LENGTH and bool(_NAME.fullmatch(value))


def _check_replication(file: Path, ranges: Any, limit: int) -> None:
    """Check the ranges: each replicated layer has its own weights in the adapter."""
    total = 0
    for entry in ranges if isinstance(ranges, list) else [ranges]:
        pair = isinstance(entry, list) and len(entry) == 2 and all(type(n) is int for n in entry)
        if not pair or not 0 <= entry[0] < entry[1]:
            fail_entry(file, "layer_replication", "ranges [first, last)", entry)
        total += entry[1] - entry[0]
    if total > limit:
        expected = f"at most {limit} layers, one per stored tensor"
        fail_entry(file, "layer_replication", expected, total)


def _check_weights(model: Any, config: Any, files: TensorFiles) -> None:
    """Compare the adapter, built on the meta device, with the header of its weights."""
    from peft import get_peft_model, get_peft_model_state_dict

    config = copy.deepcopy(config)
    for name in _INITIAL:  # weights on the meta device cannot be decomposed
        if hasattr(config, name):
            setattr(config, name, False)
    with (
        as_checkpoint_error(files.path, "an adapter of this base"),
        warnings.catch_warnings(),
        torch.device("meta"),
    ):
        warnings.simplefilter("ignore")
        adapted = get_peft_model(_without_memory(model), config)
        # Do not save embeddings: peft would ask the hub about the base's vocabulary.
        expected_state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        everything = adapted.state_dict()
    folder = files.path.parent.name
    if missing := sorted(expected_state.keys() - set(files.names())):
        got = f"{len(missing)} missing (first: {printable(missing[0])})"
        fail_checkpoint("path", f"all weights of the adapter in {folder}", got, _OTHER_BASE)
    if extra := sorted(set(files.names()) - expected_state.keys() - everything.keys()):
        got = f"{len(extra)} unused (first: {printable(extra[0])})"
        fail_checkpoint("path", f"the weights of the adapter in {folder}", got, _OTHER_BASE)
    for name in files.names():
        shape = tuple((expected_state.get(name, everything.get(name))).shape)
        if files.shape(name) != shape:
            expected = f"the shape {list(shape)} that {ADAPTER} asks for"
            files.fail(name, expected, list(files.shape(name)))


def _without_memory(model: Any) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    clone: nn.Module = copy.deepcopy(model, memo=memo)
    return clone
