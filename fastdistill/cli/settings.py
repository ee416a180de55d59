"""A verb's settings: its dataclass, filled from a YAML file, then key=value, then options.

Values are read by YAML 1.2 (only true and false are booleans, and 1e-4 is a number), and fitted to
the annotated type of the field. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..runtime.printable import printable

_DEEPEST, _LARGEST = 32, 100_000  # levels and values of a settings file
_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"^(|~|null|Null|NULL|None)$", ["", *"~nN"]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text",
          list: "a list", tuple: "a list", dict: "a mapping"}  # fmt: skip


SUGGESTIONS = 5  # of equal rank, at most
_ABBREVIATED = {"lr": "learning_rate"}  # as in lr_scheduler_type; the initials of two others, too


class Text(str):
    """A value as it was typed: a number, a word or a list, whichever its setting takes."""


def gather(file: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """What a file and the pairs say, the pairs last; keys are as in Python (teacher_quant)."""
    said: dict[str, Any] = {}
    if file is not None:
        said.update(_of_file(file))
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"arguments: expected key=value, got {pair!r}")
        said[_name(key)] = Text(value)
    return said


def refuse_unknown(said: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for key in said:
        if key not in known:
            near = nearest(key, known)
            hint = f". Did you mean {' or '.join(near)}?" if near else ". See --help"
            raise ValueError(f"{key}: expected a setting of this command, got an unknown one{hint}")


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """Return the settings that a wrong key may stand for, none where no name is like it.

    In this order: a slip of the keyboard; the first letters of a name's words (wd); a name that has
    the words of the key, or longer ones that begin so (batch_size, grad_accum), of which those of
    training are preferred, then the shortest; the most alike.
    """
    slips = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if slips:
        return slips
    if _ABBREVIATED.get(key) in known:
        return [_ABBREVIATED[key]]
    initials = [name for name in known if "".join(part[0] for part in _parts_of(name)) == key]
    if initials:
        return initials
    having = [name for name in known if _has_words(_parts_of(name), _parts_of(key))]
    if having:
        ranks = {name: ("train" not in _parts_of(name), len(_parts_of(name))) for name in having}
        best = min(ranks.values())
        return [name for name in having if ranks[name] == best][:SUGGESTIONS]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.6)


def _parts_of(name: str) -> list[str]:
    return [part for part in name.lower().split("_") if part]


def _has_words(name: list[str], wanted: list[str]) -> bool:
    """Whether words of the name begin as the wanted ones do, in their order."""
    rest = iter(name)
    return bool(wanted) and all(any(word.startswith(part) for word in rest) for part in wanted)


def fill(kind: type, said: Mapping[str, Any]) -> Any:
    """The dataclass, its fields set to what was said, fitted to their types."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if field.default is MISSING and said.get(field.name) is None:
            option = field.name.replace("_", "-")
            raise ValueError(f"{field.name}: expected a value, got none. Pass --{option}")
    return kind(**{name: fit(name, value, hints[name]) for name, value in said.items()})


def names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def fit(name: str, value: Any, hint: Any) -> Any:
    """`value` as one of the types that `hint` allows; raises ValueError otherwise."""
    allowed = _members(hint)
    if isinstance(value, Text):
        value = _read(name, value, allowed)
    if Any in allowed or (value is None and type(None) in allowed):
        return value
    for kind in allowed:
        if type(value) is kind:
            return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if float in allowed:
            return float(value)
        if int in allowed and float(value).is_integer():
            return int(value)
    for kind in allowed:
        if isinstance(kind, type) and issubclass(kind, (Path, Enum)):
            return _made(name, kind, str(value))
    if str in allowed and isinstance(value, (int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    for kind in (tuple, list):
        if kind in allowed and isinstance(value, (str, int, float, list)):
            parts = value if isinstance(value, list) else _parts(value)
            return kind(fit(name, part, _element(hint)) for part in parts)
    words = [_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in allowed
             if kind is not type(None)]  # fmt: skip
    raise ValueError(f"{name}: expected {' or '.join(words)}, got {printable(repr(value))}")


def _read(name: str, text: Text, allowed: list[Any]) -> Any:
    """The value that a text stands for; of a setting that takes words, words are as typed, where
    YAML would take comments out and fold lines."""
    words = any(kind is str or kind is Path for kind in allowed)
    try:
        value = _yaml(text, f"{name}: {str(text)!r}")
    except ValueError:
        if not words:
            raise
        return str(text)
    typed = text.strip()
    quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
    as_typed = (isinstance(value, str) and not quoted) or (value is None and typed[:1] == "#")
    return str(typed) if words and (as_typed or type(value) not in allowed) else value


def as_yaml(said: Mapping[str, Any]) -> str:
    """Text that `gather` reads back as the same settings."""
    import yaml

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: typing.ClassVar[Any] = {}

    _resolve(Dumper)
    plain = {key: _plain(value) for key, value in said.items()}
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _of_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected a YAML file, got {file}: {error}") from None
    said = _yaml(text, str(file))
    if not isinstance(said, dict):
        raise ValueError(f"config: expected key: value in {file}, got {type(said).__name__}")
    return {_name(str(key)): value for key, value in said.items()}


def _name(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[Any] = {}

    _resolve(Loader)
    for tag, kind in (("int", int), ("float", float)):
        Loader.add_constructor(_TAG + tag, lambda loader, node, kind=kind: kind(node.value))
    where = printable(where)
    try:
        check_yaml(text, where)
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))
        raise ValueError(f"{where}: expected YAML, got {reason}") from None


def check_yaml(text: str, where: str) -> None:
    """Raise ValueError for a YAML text that is nested too deeply, that names a setting twice, or
    whose aliases stand for more than a settings file holds."""
    import yaml

    sizes: dict[str, int] = {}  # of what an anchor stands for
    parents: list[_Node] = [_Node(None, False)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            parents.append(_Node(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(parents) > _DEEPEST:
                raise ValueError(f"{where}: expected at most {_DEEPEST} levels, got more")
            continue
        node, key = _Node(None, False), None
        if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            node = parents.pop()
        elif isinstance(event, yaml.ScalarEvent):
            node.anchor, key = event.anchor, event.value
        elif isinstance(event, yaml.AliasEvent):
            node.size = sizes.get(event.anchor, _LARGEST + 1)  # of itself: without end
        else:
            continue
        if node.anchor is not None:
            sizes[node.anchor] = node.size
        if parents[-1].add(node.size, key):
            raise ValueError(f"{where}: expected each setting once, got {printable(key)} twice")
        if parents[-1].size > _LARGEST:
            raise ValueError(f"{where}: expected at most {_LARGEST:,} values, got more")


class _Node:
    """A collection that is being read: how many values it stands for, and its keys so far."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor, self.is_mapping = anchor, is_mapping
        self.size, self.entries = 1, 0
        self.keys: set[str] = set()

    def add(self, size: int, key: str | None) -> bool:
        """Count one more entry; return whether it is a key that was there before."""
        is_key = self.is_mapping and self.entries % 2 == 0 and key is not None
        self.size, self.entries = self.size + size, self.entries + 1
        if not is_key or key is None:
            return False
        twice = key in self.keys
        self.keys.add(key)
        return twice


def _resolve(kind: Any) -> None:
    """The core schema of YAML 1.2, by which a loader or dumper tells words from other scalars."""
    for tag, pattern, first in _CORE:
        kind.add_implicit_resolver(_TAG + tag, re.compile(pattern), first)


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [one for member in typing.get_args(hint) for one in _members(member)]
    return [typing.get_origin(hint) or hint]


def _element(hint: Any) -> Any:
    for member in (hint, *typing.get_args(hint)):
        if typing.get_origin(member) in (list, tuple) and typing.get_args(member):
            return typing.get_args(member)[0]
    return Any


def _parts(value: Any) -> list[Any]:
    return [_yaml(part, part) for part in str(value).split(",")]


def _made(name: str, kind: Any, value: str) -> Any:
    if issubclass(kind, Path) and not value:  # Path("") is the folder that one is in
        raise ValueError(f"{name}: expected a path, got an empty text")
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return str(value) if isinstance(value, Path) else value
