"""Resolves a path or name of a teacher or model to its kind.

server    http://… or https://…
cache     a folder with a cache's manifest, or with an unfinished build
gguf      a .gguf file
adapter   a folder with an adapter but not its base
model     a folder with config.json and *.safetensors
hub       owner/model, where no such path exists
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..quant.formats.file_names import ADAPTER, CONFIG
from ..runtime import checks
from ..runtime.printable import printable

SETTINGS, MANIFEST = "settings.json", "manifest.json"  # of a cache
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth")
_KNOWN = "a directory with config.json and *.safetensors, or a .gguf file"


class Source(NamedTuple):
    """kind: one of those above. path: of the file or folder. name: as passed; URL or hub name."""

    kind: str
    path: Path
    name: str


def is_url(path_or_name: object) -> bool:
    """Whether this is the URL of a server."""
    return isinstance(path_or_name, str) and path_or_name.startswith(("http://", "https://"))


def is_adapter(path_or_name: str | Path) -> bool:
    """Whether this is the folder of an adapter."""
    file = _expanded(path_or_name) / ADAPTER
    return _exists(file) and file.is_file()


def source_of(role: str, path_or_name: str | Path) -> Source:
    """Return the source that `path_or_name` refers to; errors name it by `role`.

    Raises:
        FileNotFoundError: nothing exists there, and it is no hub name.
        ValueError: it is none of the kinds above: pickles, a folder of .gguf files of which one
        must be named, or another folder.
    """
    name = str(path_or_name)
    if is_url(name):
        return Source("server", Path(), name)
    path = _expanded(path_or_name)
    if not _exists(path):
        if HUB_NAME.fullmatch(name):
            return Source("hub", path, name)
        raise FileNotFoundError(
            f"{role}: expected a checkpoint or the hub's name of one (owner/model), got "
            f"{printable(repr(name))}, where nothing exists"
        )
    if path.is_file() and path.suffix == ".gguf":
        return Source("gguf", path, name)
    whole = (path / CONFIG).is_file()
    adapted = is_adapter(path)  # a checkpoint of a training also has a file named settings.json
    if not (whole or adapted) and any((path / file).is_file() for file in (MANIFEST, SETTINGS)):
        return Source("cache", path, name)
    weights = sorted(path.glob("*.safetensors"))
    others = [file for file in weights if file.name != ADAPTER_WEIGHTS]
    if adapted and not (whole and others):
        return Source("adapter", path, name)
    if whole and weights:
        return Source("model", path, name)
    _fail(role, path, name)


def model_source(role: str, path_or_name: str | Path, hint: str = "") -> Source:
    """Return the source of a model; raise ValueError for a cache and a server, which have none.

    hint: what to pass instead of them. Other errors are those of `source_of`."""
    source = source_of(role, path_or_name)
    if source.kind in ("cache", "server"):
        what = "a cache of answers" if source.kind == "cache" else "the URL of a server"
        hint = hint or "pass the model that gave the answers; train and cache build read these"
        checks.fail(role, "a model", f"{printable(source.name)}, {what}", hint)
    return source


def _expanded(path_or_name: str | Path) -> Path:
    """Return the path with "~" expanded; unchanged if there is no such user."""
    try:
        return Path(path_or_name).expanduser()
    except RuntimeError:
        return Path(path_or_name)


def _exists(path: Path) -> bool:
    """Whether the path exists; False if it is too long for the system."""
    try:
        return path.exists()
    except OSError:
        return False


def _fail(role: str, path: Path, name: str) -> NoReturn:
    files = [path] if path.is_file() else sorted(path.glob("*"))
    if gguf := [file for file in files if file.suffix == ".gguf"]:
        names = ", ".join(printable(file.name) for file in gguf[:4])
        got = f"{printable(name)}, a directory with {names}"
        checks.fail(role, _KNOWN, got, f"name the file: {printable(gguf[0])}")
    pickles = [printable(file.name) for file in files if file.suffix in _PICKLES]
    hint = "a pickle can run code: load it where you trust it, and save_pretrained it again"
    got = ", ".join(pickles) if path.is_dir() else ""
    checks.fail(role, _KNOWN, got or printable(name), hint if pickles else "")
