"""Settings of a command: a dataclass filled from a YAML file, then KEY=VALUE, then options.

Values follow YAML 1.2 (only true and false are booleans, and 1e-4 is a number) and are converted to
the annotated type of the field. An unknown key is an error that suggests the nearest known key.
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..runtime.checks import fail
from ..runtime.printable import printable

_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}

_MAX_SUGGESTIONS = 5
_ABBREVIATIONS = {"lr": "learning_rate"}  # also the initials of two other settings


class Text(str):
    """A value as typed on the command line, before conversion to the type of its setting."""


def gather(file: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a YAML file and KEY=VALUE pairs; pairs take precedence."""
    raw: dict[str, Any] = {} if file is None else _read_file(file)
    typed: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            fail("arguments", "key=value", repr(pair))
        if (name := _normalize_key(key)) in typed:
            fail(name, "one value", f"{typed[name]!r} and {value!r}")
        typed[name] = Text(value)
    return raw | typed


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for an unknown setting, with the nearest known ones."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = nearest(key, known)
            hint = f". Did you mean {' or '.join(near)}?" if near else ". See --help"
            name = printable(key, 60)
            raise ValueError(
                f"{name}: expected a setting of this command, got an unknown one{hint}"
            )


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Return the known settings closest to an unknown key; empty if none is close.

    Tried in this order: typing errors; initials (wd); names whose words start with the words of the
    key (batch_size, grad_accum), first those that start with the key, then those of training, then
    the shortest; the most similar name.
    """
    typos = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if typos:
        return typos
    if _ABBREVIATIONS.get(key) in known:
        return [_ABBREVIATIONS[key]]
    initials = [name for name in known if "".join(part[0] for part in _words_in(name)) == key]
    if initials:
        return initials
    candidates = [name for name in known if _matches_words(_words_in(name), _words_in(key))]
    if candidates:
        ranks = {
            name: (
                not name.startswith(key.lower()),
                "train" not in _words_in(name),
                len(_words_in(name)),
            )
            for name in candidates
        }
        best = min(ranks.values())
        return [name for name in candidates if ranks[name] == best][:_MAX_SUGGESTIONS]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.6)


def _words_in(name: str) -> list[str]:
    return [part for part in name.lower().split("_") if part]


def _matches_words(name: list[str], prefixes: list[str]) -> bool:
    """Whether words of the name start with the prefixes, in order."""
    rest = iter(name)
    return bool(prefixes) and all(any(word.startswith(part) for word in rest) for part in prefixes)


def fill(kind: type, raw: Mapping[str, Any]) -> Any:
    """Return the dataclass `kind` with its fields converted from raw values."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if field.default is MISSING and raw.get(field.name) is None:
            option = field.name.replace("_", "-")
            fail(field.name, "a value", "none", f"pass --{option}")
    return kind(**{name: coerce(name, value, hints[name]) for name, value in raw.items()})


def field_names(kind: type) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Return `value` converted to a type that `hint` allows; raises ValueError otherwise."""
    allowed = _union_members(hint)
    if isinstance(value, Text):
        value = _parse_text(name, value, allowed)
    if Any in allowed or (value is None and type(None) in allowed):
        return value
    for kind in allowed:
        if type(value) is kind:
            return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if float in allowed and abs(value) <= sys.float_info.max:
            return float(value)
        if int in allowed and float(value).is_integer():
            return int(value)
    for kind in allowed:
        if isinstance(kind, type) and issubclass(kind, (Path, Enum)):
            return _construct(name, kind, str(value))
    if str in allowed and isinstance(value, (int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    for kind in (tuple, list):
        if kind in allowed and isinstance(value, (str, int, float, list)):
            if not isinstance(value, list):
                value = [_yaml(part, part) for part in str(value).split(",")]
            return kind(coerce(name, part, _element_type(hint)) for part in value)
    words = [
        _TYPE_NAMES.get(kind, getattr(kind, "__name__", str(kind)))
        for kind in allowed
        if kind is not type(None)
    ]
    fail(name, " or ".join(words), printable(repr(value)))


def _parse_text(name: str, text: Text, allowed: list[Any]) -> Any:
    """Return the YAML value of a text.

    Settings that accept str or Path keep words as typed: YAML would drop comments and fold lines.
    """
    accepts_words = any(kind is str or kind is Path for kind in allowed)
    try:
        value = _yaml(text, f"{name}: {str(text)!r}")
    except ValueError:
        if not accepts_words:
            raise
        return str(text)
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\""
    as_typed = (isinstance(value, str) and not quoted) or (value is None and stripped[:1] == "#")
    return str(stripped) if accepts_words and (as_typed or type(value) not in allowed) else value


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Return YAML that `gather` reads back as the same settings."""
    import yaml

    from ..runtime.yaml_text import add_core_schema

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: typing.ClassVar[Any] = {}

    add_core_schema(Dumper)
    plain = {key: _to_plain(value) for key, value in settings.items()}
    return str(yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = printable(error)
        raise ValueError(f"config: expected a YAML file, got {file}: {reason}") from None
    raw = _yaml(text, str(file))
    if not isinstance(raw, dict):
        fail("config", f"key: value in {file}", type(raw).__name__)
    settings = {_normalize_key(str(key)): value for key, value in raw.items()}
    if len(settings) < len(raw):
        names = [_normalize_key(str(key)) for key in raw]
        name = next(name for name in names if names.count(name) > 1)
        got = f"{printable(name)} twice, with dashes and with underscores"
        fail("config", f"each setting once in {file}", got)
    return settings


def _normalize_key(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def _yaml(text: str, where: str) -> Any:
    from ..runtime.yaml_text import parse_yaml

    return parse_yaml(text, where)


def _union_members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for member in typing.get_args(hint) for one in _union_members(member)]
    return [typing.get_origin(hint) or hint]


def _element_type(hint: Any) -> Any:
    for member in (hint, *typing.get_args(hint)):
        if typing.get_origin(member) in (list, tuple) and typing.get_args(member):
            return typing.get_args(member)[0]
    return Any


def _construct(name: str, kind: Any, value: str) -> Any:
    if issubclass(kind, Path) and not value:  # Path("") is the current folder
        raise ValueError(f"{name}: expected a path, got an empty text")
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _to_plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_to_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _to_plain(part) for key, part in value.items()}
    return str(value) if isinstance(value, Path) else value
