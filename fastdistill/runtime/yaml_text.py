"""Untrusted YAML: the core schema of YAML 1.2 in bounded time; every error is a ValueError.

Only true and false are booleans, and 1e-4 is a number. Other types, such as dates, are errors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from .printable import printable

MAX_DEPTH, MAX_VALUES = 32, 100_000  # of a document; an alias counts as what it stands for
MAX_LENGTH = 1 << 18  # characters: PyYAML reads about 50,000 a second
_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = (
    ("null", r"^(|~|null|Null|NULL|None)$", ["", *"~nN"]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
)


class _TooDeep(Exception):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[Any] = {}
    yaml_constructors: ClassVar[Any] = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Stop at a deep node while it is read: PyYAML takes quadratic time for deep ones."""
        if self._depth >= MAX_DEPTH:
            raise _TooDeep
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _scalar(convert: Callable[[str], Any]) -> Callable[[Any, Any], Any]:
    def construct(loader: Any, node: Any) -> Any:
        text = loader.construct_scalar(node)
        try:
            return convert(text)
        except (ValueError, KeyError):
            kind = node.tag.removeprefix(_TAG)
            reason = f"expected a value of type {kind}, got {printable(repr(text), 60)}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None

    return construct


def add_core_schema(kind: Any) -> None:
    """Give a loader or dumper of PyYAML the core schema of YAML 1.2."""
    for tag, pattern, first in _CORE_SCHEMA:
        kind.add_implicit_resolver(_TAG + tag, re.compile(pattern), first)


add_core_schema(_Loader)
_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": float,
}
for _name, _convert in _SCALARS.items():
    _Loader.add_constructor(_TAG + _name, _scalar(_convert))
_Loader.add_constructor(_TAG + "str", yaml.SafeLoader.construct_yaml_str)
_Loader.add_constructor(_TAG + "seq", yaml.SafeLoader.construct_yaml_seq)
_Loader.add_constructor(_TAG + "map", yaml.SafeLoader.construct_yaml_map)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text; None for an empty one.

    Args:
        text: the document. source: what the error names, such as the file.

    Raises:
        ValueError: the text is not YAML, has another type than those of the core schema, a name
        twice in a mapping, or is too long, too deep or too large.
    """
    source = printable(source)
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{source}: expected at most {MAX_LENGTH:,} characters, got {len(text):,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, source, {}) >= MAX_VALUES:
            raise ValueError(f"{source}: expected at most {MAX_VALUES:,} values, got more")
        return loader.construct_document(node)
    except (_TooDeep, RecursionError):
        raise ValueError(f"{source}: expected at most {MAX_DEPTH} levels, got more") from None
    except yaml.YAMLError as error:
        reason = printable(" ".join(str(error).split()))
        raise ValueError(f"{source}: expected YAML, got {reason}") from None


def _count_values(node: Any, source: str, counts: dict[Any, int]) -> int:
    """Return the number of values in a node; raise ValueError for a name that is repeated."""
    if node in counts:
        return counts[node]
    counts[node] = MAX_VALUES  # of a collection that contains itself
    parts = node.value if isinstance(node.value, list) else []
    if parts and isinstance(parts[0], tuple):
        keys = Counter(key.value for key, _ in parts if isinstance(key.value, str))
        for key, times in keys.items():
            if times > 1:
                raise ValueError(
                    f"{source}: expected each setting once, got {printable(key)} twice"
                )
        parts = [part for pair in parts for part in pair]
    counts[node] = 1 + sum(_count_values(part, source, counts) for part in parts)
    return counts[node]
