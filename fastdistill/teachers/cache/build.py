"""Builds a cache shard by shard, resumably and reproducibly.

When all rows of a shard are answered, it is written to a temporary file, synced, renamed, and then
recorded. A resumed build keeps the recorded shards and builds the others from the same batches, so
its bytes equal those of an uninterrupted build.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ...hf.encoder import Encoder
from ...hf.source import MANIFEST, SETTINGS
from ...losses.answer_checks import AnswerRules, find_invalid, find_shape_error, row_and_position
from ...losses.types import TopK
from ...runtime.atomic_files import naming_full_disk, write_json
from ...runtime.printable import printable
from ...runtime.progress import RowProgress
from .codec import Array, pack
from .hidden_states import find_not_finite
from .manifest import (
    CacheError,
    Manifest,
    Settings,
    Shard,
    check_links,
    read_settings,
    read_shard_record,
    shard_name,
    write_manifest,
)
from .shards import Writer, key_of

_START_TIMEOUT = 60.0  # seconds in which the other processes of a build must start
_LOCK = ".building-{rank}"


@dataclass(frozen=True)
class PendingRow:
    """A row to be answered: its attended tokens, and the positions among them to answer."""

    index: int  # in the dataset
    tokens: Tensor  # (T,) int64
    places: Tensor  # (P,) int64

    @property
    def key(self) -> bytes:
        return key_of(self.tokens.numpy())


class Examples(NamedTuple):
    """A dataset, and what encodes its examples."""

    dataset: Any
    encoder: Encoder

    def row(self, index: int, positions: str) -> PendingRow:
        """Return an example as a row to be answered at "all" positions or at its "targets"."""
        row = self.encoder(self.dataset[index], index)
        attended = row.attention_mask != 0
        tokens = row.ids[attended]
        if positions == "all":
            return PendingRow(index, tokens, torch.arange(len(tokens)))
        return PendingRow(index, tokens, (row.targets[attended][1:] >= 0).nonzero()[:, 0])


class Source(Protocol):
    """Answers the rows of a shard.

    answers_all: whether every place has an answer; if not, some may be empty."""

    answers_all: bool

    def answers(
        self, rows: list[PendingRow], settings: Settings, shard: int
    ) -> Iterator[tuple[list[int], list[TopK] | Tensor]]:
        """Yield (indices into `rows`, their concatenated answers [Σ P, ≤ k] per temperature).

        Of answers="hidden" they are one tensor [Σ P, L + 1, H].

        Every row with at least one place is yielded once."""


def build(
    folder: Path,
    settings: Settings,
    source: Source,
    examples: Examples,
    *,
    bytes_per_row: float,
    rank: int = 0,
    world: int = 1,
) -> Manifest:
    """Build or resume this process's shards; return when the shards of all processes exist.

    Raises:
        CacheError: another process is building here, the settings or examples differ from those of
            the first run, an answer is no distribution, or another process stopped.
        OSError: no space or no permission. Finished shards stay, and the next build resumes.
        If no shard is finished, an error leaves the folder as it was.
    """
    check_links(folder)
    with _prepared_folder(folder, rank), _exclusive(folder, rank):
        stored = check_existing_build(folder, settings, rank)
        if stored is None:
            write_json(folder / SETTINGS, settings.as_json())
            stored = read_settings(folder)
        settings = stored
        own_shards = range(rank, settings.shards, world)
        done = {i: n for i in own_shards if (n := read_shard_record(folder, i)) is not None}
        for index, record in done.items():
            _check_same_rows(folder, index, record, settings, examples)
        _remove_leftovers(folder, [i for i in own_shards if i not in done], alone=world == 1)
        total = sum(len(settings.rows_of(i)) for i in own_shards)
        rows_done, size = sum(n.rows for n in done.values()), sum(n.bytes for n in done.values())
        _check_free_space(folder, bytes_per_row * (total - rows_done))
        with (
            RowProgress("Caching the teacher", total=total, done=rows_done, size=size) as bar,
            ThreadPoolExecutor(1) as pool,
        ):
            # One shard is written in a thread, while the teacher answers the next one.
            writing: Future[None] | None = None
            for index in own_shards:
                if index not in done:
                    writer = _answer_shard(index, settings, source, examples, bar)
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(_write, folder, settings, index, writer)
            if writing is not None:
                writing.result()
    return _wait_for_all(folder, settings, rank, world)


def _answer_shard(
    index: int, settings: Settings, source: Source, examples: Examples, bar: RowProgress
) -> Writer:
    rows = [examples.row(i, settings.positions) for i in settings.rows_of(index)]
    writer = Writer(settings, [row.key for row in rows], [row.places.numpy() for row in rows])
    for group, answers in source.answers(rows, settings, index):
        group_rows = [rows[at] for at in group]
        packed = _pack(answers, group_rows, settings, source.answers_all)
        for at in group:
            packed = writer.put(at, packed)
        tokens = sum(len(rows[at].places) for at in group)
        bar.advance(len(group), tokens * settings.bytes_per_token)
    return writer


def _pack(
    answers: list[TopK] | Tensor, rows: list[PendingRow], settings: Settings, answers_all: bool
) -> dict[str, Array]:
    """Return the checked answers as they are stored."""
    if settings.hidden is not None:
        assert isinstance(answers, Tensor)
        _check_states(answers, rows)
        return settings.hidden.pack(answers)
    assert isinstance(answers, list)
    for answer in answers:
        _check_answers(answer, rows, settings, answers_all)
    return pack(answers, settings.k, settings.blocks)._asdict()


def _check_states(states: Tensor, rows: list[PendingRow]) -> None:
    wrong = find_not_finite(states)
    if wrong is None:
        return
    row, place = row_and_position([len(row.places) for row in rows], wrong)
    raise CacheError(
        "teacher: expected finite hidden states, got NaN or infinity for example "
        f"{rows[row].index}, position {int(rows[row].places[place])}. Nothing of this shard was "
        "written; load the teacher in a type with a larger range"
    )


def _check_answers(
    answer: TopK, rows: list[PendingRow], settings: Settings, answers_all: bool
) -> None:
    lengths = [len(row.places) for row in rows]
    shape = find_shape_error(answer, (sum(lengths),), settings.k)
    if shape is not None:
        raise CacheError(f"teacher: {shape}")
    wrong = find_invalid(answer, AnswerRules(vocab=settings.ids, nothing=not answers_all))
    if wrong is None:
        return
    row, place = row_and_position(lengths, wrong.at)
    hint = f" ({wrong.hint})" if wrong.hint else ""
    raise CacheError(
        "teacher: expected the answers of a language model, got an invalid one at T="
        f"{answer.temperature:g} for example {rows[row].index}, position "
        f"{int(rows[row].places[place])}: {wrong}{hint}. Nothing of this shard was written"
    )


def _write(folder: Path, settings: Settings, index: int, writer: Writer) -> None:
    try:
        with naming_full_disk(folder):
            if not (folder / SETTINGS).is_file():  # another rank failed and removed it
                write_json(folder / SETTINGS, settings.as_json())
            shard = writer.write(folder / shard_name(index))
            write_json((folder / shard.file).with_suffix(".json"), asdict(shard))
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise OSError(
            error.errno,
            f"{reason}: writing {shard_name(index)}. Finished shards are kept; make room and build "
            "again with the same settings",
            str(folder),
        ) from error


@contextlib.contextmanager
def _prepared_folder(folder: Path, rank: int) -> Iterator[None]:
    """Create the folder and check that it is writable; undo this if the build fails at once.

    A killed or interrupted build leaves its settings, and the next one resumes."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    begun_before = (folder / SETTINGS).is_file()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK.format(rank=rank)).touch()
    except OSError as error:
        _remove_empty(missing)
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            error.errno,
            f"path: expected a folder that can be written to, got {str(folder)!r} "
            f"({error.strerror}). Choose another, or let this user write there",
        ) from None
    try:
        yield
    except Exception:
        if not begun_before and not _is_in_use(folder, rank):
            (folder / SETTINGS).unlink(missing_ok=True)
        _remove_empty(missing)
        raise


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # one is not empty, or does not exist
        for folder in folders:
            folder.rmdir()


def _is_in_use(folder: Path, rank: int) -> bool:
    """Whether a shard is finished or another rank is building in this folder."""
    if any(folder.glob("[0-9]*.safetensors")):
        return True
    own_lock = _LOCK.format(rank=rank)
    return any(p.name != own_lock and _is_locked(p) for p in folder.glob(_LOCK.format(rank="*")))


@contextlib.contextmanager
def _exclusive(folder: Path, rank: int) -> Iterator[None]:
    """Hold the lock of this rank's shards; raise CacheError if another process holds it."""
    path = folder / _LOCK.format(rank=rank)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)  # a rank that probes the lock holds it for an instant
    except Timeout:
        raise CacheError(
            f"{folder}: expected no other builder, but another process is building"
            f"{f' as rank {rank}' if rank else ''}. Wait for it, or give each process its own rank"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes the file on release
            path.unlink(missing_ok=True)
        lock.release()


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


def check_existing_build(folder: Path, settings: Settings, rank: int = 0) -> Settings | None:
    """Return the settings of the build in this folder; None if there is nothing to resume.

    Sharding, library versions and batch size may differ from `settings`.

    Raises:
        CacheError: other settings differ, or the folder holds something else.
    """
    if not (folder / SETTINGS).is_file():
        if any(folder.glob("*.safetensors")):
            raise CacheError(
                f"path: expected an empty folder or a cache, got {str(folder)!r} with other "
                "safetensors in it"
            )
        return None
    stored = read_settings(folder)
    expected = replace(
        settings,
        rows_per_shard=stored.rows_per_shard,
        library=stored.library,
        tokens_per_batch=stored.tokens_per_batch,
    )
    new_values, old_values = expected.as_json(), stored.as_json()
    names = ("targets", *{**new_values, **old_values})
    differing = [name for name in names if new_values.get(name) != old_values.get(name)]
    if differing and not _is_in_use(folder, rank):  # killed before anything was finished
        return None
    if differing:
        name = differing[0]
        old, new = (printable(repr(values.get(name)), 200) for values in (old_values, new_values))
        raise CacheError(
            f"{folder}: begun with {name}={old}, got {name}={new}. Build into another folder, or "
            f"resume with the settings in {SETTINGS}"
        )
    return stored


def _check_same_rows(
    folder: Path, index: int, record: Shard, settings: Settings, examples: Examples
) -> None:
    rows = settings.rows_of(index)
    for at, key in ((rows[0], record.first_row), (rows[-1], record.last_row)):
        if examples.row(at, settings.positions).key.hex() != key:
            raise CacheError(
                f"{folder}: expected the examples that it was begun with, but the tokens of "
                f"example {at} differ from those in {record.file}. Build another dataset into "
                "another folder"
            )


def _remove_leftovers(folder: Path, to_do: list[int], alone: bool) -> None:
    """Remove temporary files of killed processes."""
    names = [shard_name(index) for index in to_do]
    names += [name.replace(".safetensors", ".json") for name in names]
    if alone:
        names += [SETTINGS, MANIFEST]
    for name in names:
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink()


def _check_free_space(folder: Path, needed: float) -> None:
    """Raise OSError early if the disk is too full, by an estimate from sampled examples."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"expected about {needed / 1e9:,.1f} GB of free space for the answers, got "
            f"{free / 1e9:,.1f}. Make room, or store less: a smaller k, positions='targets'",
            str(folder),
        )


def _wait_for_all(folder: Path, settings: Settings, rank: int, world: int) -> Manifest:
    """Wait for the other processes and return the manifest; the last one to finish writes it."""
    for own in range(rank, settings.shards, world):
        if read_shard_record(folder, own) is None:
            raise CacheError(
                f"{folder}: expected {shard_name(own)} and its record, which this build finished, "
                "got none or another size. Start again with the same settings: other shards are "
                "kept"
            )
    started = time.monotonic()
    missing = list(range(settings.shards))
    while True:
        missing = [i for i in missing if read_shard_record(folder, i) is None]
        if not missing and (manifest := write_manifest(folder, settings)) is not None:
            for path in folder.glob(_LOCK.format(rank="*")):  # of killed processes
                if not _is_locked(path):
                    path.unlink(missing_ok=True)
            return manifest
        idle = [i for i in missing if not _is_locked(folder / _LOCK.format(rank=i % world))]
        if idle and time.monotonic() - started > _START_TIMEOUT:
            raise CacheError(
                f"{folder}: rank {idle[0] % world} of {world} stopped before {shard_name(idle[0])} "
                "was finished. Restart it with the same settings: finished shards are kept"
            )
        time.sleep(0.2)
