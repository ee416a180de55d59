"""A text corpus on every machine: the source of the Python standard library.

A hash of the module assigns each file to the training or the held-out split. A module is in the
same split on every machine and in every Python version: a teacher trained elsewhere has not seen
the held-out split.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ....runtime.checks import fail

END_OF_TEXT = "<|endoftext|>"

# Tests and fixtures are repetitive, Tk is an optional package, codec tables and generated files are
# numbers, and _sysconfigdata holds the paths of the machine that built the interpreter.
_SKIPPED_DIRS = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data lib2to3 "
    "idlelib tkinter turtledemo lib-dynload ensurepip __phello__".split()
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
_TEXT_SUFFIXES = frozenset(".py .pyi .txt .md .rst .c .h .cc .cpp .rs .go .js .ts .java".split())
_MIN_BYTES, _MAX_BYTES = 512, 400_000


class Document(NamedTuple):
    """One file: its path relative to the corpus root, and its text."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out documents; no module is in both."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def standard_library() -> Corpus:
    """The source of the standard library of the running interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = list(_read_folder(root, suffixes=frozenset({".py"})))
    if sum(len(document.text) for document in documents) < 1_000_000:
        raise ValueError(
            "data: expected the source of the standard library, got almost none (it may be in a "
            "zip file); pass data=<a folder of text> instead"
        )
    return _split("Python standard library", documents, module_of)


def from_path(path: str | Path) -> Corpus:
    """A text file, or the text files below a folder."""
    path = Path(path)
    if path.is_file():
        return _split_one_file(path)
    if not path.is_dir():
        fail("data", "a text file or a folder of text files", path)
    documents = list(_read_folder(path, suffixes=_TEXT_SUFFIXES))
    return _split(path.name, documents, lambda name: name)


def module_of(name: str) -> str:
    """The top-level module of a standard-library file, stable across Python versions.

    zipfile.py became zipfile/__init__.py, and datetime.py became _pydatetime.py: with a split by
    file name, the same code would change splits between versions.
    """
    top = name.split("/", 1)[0].removesuffix(".py")
    return top.removeprefix("_py") if top.startswith("_py") else top.lstrip("_")


def is_held_out(key: str, *, share: float = 0.12) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def train_tokenizer(
    documents: Sequence[Document], *, vocab_size: int = 2048
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text is representable, so bits per byte are comparable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


class Windows(NamedTuple):
    """Windows of equal length, the document of each, and the bytes per token of the text."""

    ids: torch.Tensor  # (N, T) int64
    document: torch.Tensor  # (N,) int64, or -1 if a window spans several
    bytes_per_token: float


def packed_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    max_windows: int | None = None,
    seed: int = 0,
) -> Windows:
    """Documents in a seeded order, joined by end-of-text, cut into windows without padding."""
    if tokenizer.eos_token_id is None:
        fail("tokenizer", "one with an end-of-text token", "eos_token_id=None")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    stream: list[int] = []
    n_bytes = 0
    for index in order.tolist():
        stream += [*_encode(tokenizer, documents[index].text), tokenizer.eos_token_id]
        n_bytes += len(documents[index].text.encode())
        if max_windows is not None and len(stream) >= max_windows * length:
            break
    n_windows = len(stream) // length
    if n_windows == 0:
        fail("data", f"at least {length} tokens of text for one window", len(stream))
    n_windows = min(n_windows, max_windows or n_windows)
    ids_NT = torch.tensor(stream[: n_windows * length]).view(n_windows, length)
    return Windows(ids_NT, torch.full((n_windows,), -1), n_bytes / len(stream))


def document_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    per_document: int,
) -> Windows:
    """Up to `per_document` windows of each document, evenly spaced: for held-out measurement.

    Windows never span documents, so documents are the independent units of an interval.
    """
    rows: list[list[int]] = []
    owner: list[int] = []
    n_bytes = n_tokens = 0
    for index, document in enumerate(documents):
        ids = _encode(tokenizer, document.text)
        n_bytes, n_tokens = n_bytes + len(document.text.encode()), n_tokens + len(ids)
        whole = len(ids) // length
        if whole == 0:
            continue
        take = min(per_document, whole)
        starts = [((2 * i + 1) * whole // (2 * take)) * length for i in range(take)]
        rows += [ids[start : start + length] for start in starts]
        owner += [index] * take
    if not rows:
        fail("data", f"a held-out document of {length} tokens or more", "none")
    return Windows(torch.tensor(rows), torch.tensor(owner), n_bytes / n_tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _read_folder(root: Path, *, suffixes: frozenset[str]) -> Iterator[Document]:
    # The name of the top folder is not filtered, only the names below it.
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix not in suffixes or any(part in _SKIPPED_DIRS for part in parts[:-1]):
            continue
        if any(part.startswith((".", *_SKIPPED_PREFIXES)) for part in parts):
            continue
        if not path.is_file() or not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield Document("/".join(parts), text)


def _split(name: str, documents: list[Document], key: Callable[[str], str]) -> Corpus:
    train = tuple(document for document in documents if not is_held_out(key(document.name)))
    held_out = tuple(document for document in documents if is_held_out(key(document.name)))
    if not train or not held_out:
        raise ValueError(
            "data: expected enough text files that some can be held out (about 20 or more, each of "
            f"{_MIN_BYTES} bytes or more), got {len(documents)}. One large text file works too"
        )
    return Corpus(name=name, train=train, held_out=held_out)


def _split_one_file(path: Path, *, pieces: int = 24) -> Corpus:
    """Cut one file into pieces and hold out the last eighth of them."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: expected UTF-8 text, got {path.name}: {error}") from None
    if len(text) < 50_000:
        fail("data", "50,000 characters of text or more", f"{len(text):,}")
    step = -(-len(text) // pieces)
    documents = tuple(
        Document(f"{path.name}#{i}", text[i * step : (i + 1) * step]) for i in range(pieces)
    )
    n_held_out = pieces // 8
    return Corpus(name=path.name, train=documents[:-n_held_out], held_out=documents[-n_held_out:])
