"""Building a cache: shard after shard, each from the same batches whatever happened before it.

A shard is written when all its rows are answered, beside its place, synced and renamed, and then
noted. A build that is started again keeps what is noted and makes the rest, so that its bytes are
those of a build that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..examples import Encoder
from ..outputs import TopK
from ..progress import Work
from .codec import pack, why_unfit
from .manifest import (
    SETTINGS,
    CacheError,
    Manifest,
    Settings,
    Shard,
    read_settings,
    read_shard_note,
    shard_name,
    write_manifest,
    write_settings,
    write_shard_note,
)
from .shards import Writer, key_of

_STARTING = 60.0  # seconds that other processes of a build have to begin
_LOCK = ".building-{rank}"


@dataclass(frozen=True)
class Asked:
    """One row whose answers are wanted: its tokens that are attended to, and where among them."""

    index: int  # in the dataset
    tokens: Tensor  # (T,) int64
    places: Tensor  # (P,) int64


class Source(Protocol):
    """Where the answers of a shard's rows come from."""

    def answers(
        self, rows: list[Asked], settings: Settings, shard: int
    ) -> Iterator[tuple[list[int], list[TopK]]]:
        """(some of `rows` by number, their answers one behind the other [Σ P, ≤ k], at every
        temperature), until all rows with a place were there."""


def build(
    folder: Path,
    settings: Settings,
    source: Source,
    dataset: Any,
    encoder: Encoder,
    *,
    bytes_per_row: float,
    rank: int = 0,
    world: int = 1,
) -> Manifest:
    """Build, or go on building, this process's shards; returns when all processes' are there.

    Raises:
        CacheError: another process is building here, other settings or examples than it was begun
            with, answers that no language model gives, or another process that stopped.
        OSError: no space, no permission. What is finished stays, and the next build goes on there.
    """
    _refuse_unwritable(folder, rank)
    with _alone(folder, rank):
        settings = _agree(folder, settings)
        mine = range(rank, settings.shards, world)
        done = {i: note for i in mine if (note := read_shard_note(folder, i)) is not None}
        for index, note in done.items():
            _refuse_other_rows(folder, index, note, settings, dataset, encoder)
        _sweep(folder, [i for i in mine if i not in done], alone=world == 1)
        total = sum(len(settings.rows_of(i)) for i in mine)
        here, size = sum(n.rows for n in done.values()), sum(n.bytes for n in done.values())
        _refuse_full(folder, bytes_per_row * (total - here))
        with (
            Work("Caching the teacher", total=total, done=here, size=size) as bar,
            _written_behind() as write,
        ):
            for index in mine:
                if index not in done:
                    writer = _answered(index, settings, source, dataset, encoder, bar)
                    write(folder, index, writer)
    return _all_finished(folder, settings, world)


def _answered(
    index: int, settings: Settings, source: Source, dataset: Any, encoder: Encoder, bar: Work
) -> Writer:
    rows = [asked_of(dataset, encoder, i, settings) for i in settings.rows_of(index)]
    keys = [key_of(row.tokens.numpy()) for row in rows]
    writer = Writer(settings, keys, [row.places.numpy() for row in rows])
    for group, answers in source.answers(rows, settings, index):
        wrong = why_unfit(answers, settings.k, settings.ids)
        if wrong is not None:
            raise CacheError(
                f"teacher: expected the answers of a language model, got {wrong} (example "
                f"{rows[group[0]].index}, or one asked with it). Nothing of this shard was written"
            )
        packed = pack(answers, settings.k, settings.blocks)
        for at in group:
            packed = writer.put(at, packed)
        tokens = sum(len(rows[at].places) for at in group)
        bar.advance(len(group), tokens * settings.bytes_per_token)
    return writer


def asked_of(dataset: Any, encoder: Encoder, index: int, settings: Settings) -> Asked:
    row = encoder(dataset[index], index)
    attended = row.attended != 0
    tokens = row.ids[attended]
    if settings.positions == "all":
        return Asked(index, tokens, torch.arange(len(tokens)))
    targets = row.targets[attended]
    return Asked(index, tokens, (targets[1:] >= 0).nonzero()[:, 0])


@contextlib.contextmanager
def _written_behind() -> Iterator[Any]:
    """A shard is hashed and synced while the teacher answers the next one; one at a time."""
    with ThreadPoolExecutor(1) as pool:
        pending: list[Future[None]] = []

        def write(folder: Path, index: int, writer: Writer) -> None:
            while pending:
                pending.pop().result()
            pending.append(pool.submit(_write, folder, index, writer))

        yield write
        while pending:
            pending.pop().result()


def _write(folder: Path, index: int, writer: Writer) -> None:
    try:
        write_shard_note(folder, writer.write(folder / shard_name(index)))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}: writing {shard_name(index)}. Finished shards are kept; "
            "make room and build again with the same settings",
            str(folder),
        ) from error


def _refuse_unwritable(folder: Path, rank: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK.format(rank=rank)).touch()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            error.errno,
            f"path: expected a folder that can be written to, got {str(folder)!r} "
            f"({error.strerror}). Choose another, or let this user write there",
        ) from None


@contextlib.contextmanager
def _alone(folder: Path, rank: int) -> Iterator[None]:
    """The one process that builds these shards, until it ends in whatever way."""
    with (folder / _LOCK.format(rank=rank)).open("a") as file:
        # More than once: another rank that looks whether this one is at work holds it an instant.
        for _ in range(10):
            if _locked(file):
                break
            time.sleep(0.05)
        else:
            raise CacheError(
                f"{folder}: expected to build here alone, but another process is building"
                f"{f' as rank {rank}' if rank else ''}. Wait for it, or give several processes a "
                "rank each"
            )
        yield


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _agree(folder: Path, settings: Settings) -> Settings:
    """What the build was begun with, which must be the same but for how it is cut into shards."""
    if not (folder / SETTINGS).is_file():
        if any(folder.glob("*.safetensors")):
            raise CacheError(
                f"path: expected an empty folder or a cache, got {str(folder)!r} with other "
                "safetensors in it"
            )
        write_settings(folder, settings)
    begun = read_settings(folder)
    wanted = replace(settings, rows_per_shard=begun.rows_per_shard, library=begun.library,
                     tokens_per_batch=begun.tokens_per_batch)  # fmt: skip
    ours, theirs = wanted.as_json(), begun.as_json()
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        name = differing[0]
        raise CacheError(
            f"{folder}: begun with {name}={_short(theirs[name])}, and now asked for with "
            f"{name}={_short(ours[name])}. Build into another folder, or go on with the settings "
            f"in {SETTINGS}"
        )
    return begun


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _refuse_other_rows(
    folder: Path, index: int, note: Shard, settings: Settings, dataset: Any, encoder: Encoder
) -> None:
    rows = settings.rows_of(index)
    for at, key in ((rows[0], note.first_row), (rows[-1], note.last_row)):
        if key_of(asked_of(dataset, encoder, at, settings).tokens.numpy()).hex() != key:
            raise CacheError(
                f"{folder}: expected the examples that it was begun with, but example {at} has "
                f"other tokens than {note.file} answers. Build another dataset into another folder"
            )


def _sweep(folder: Path, to_do: list[int], alone: bool) -> None:
    """Remove what killed processes left half written."""
    names = [shard_name(index) for index in to_do]
    for name in [*names, *(n.replace(".safetensors", ".json") for n in names)]:
        for leftover in folder.glob(f".{name}.*"):
            leftover.unlink()
    if alone:
        for leftover in [*folder.glob(".settings.json.*"), *folder.glob(".manifest.json.*")]:
            leftover.unlink()


def _refuse_full(folder: Path, needed: float) -> None:
    """Before hours of work, not behind them; the estimate is from a sample of the examples."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"expected about {needed / 1e9:,.1f} GB of free space for the answers, got "
            f"{free / 1e9:,.1f}. Make room, or store less: a smaller k, positions='targets'",
            str(folder),
        )


def _all_finished(folder: Path, settings: Settings, world: int) -> Manifest:
    """The manifest, written by whoever finishes last; waits for processes that are at work."""
    begun = time.monotonic()
    missing = list(range(settings.shards))
    while True:
        missing = [i for i in missing if read_shard_note(folder, i) is None]
        if not missing and (manifest := write_manifest(folder, settings)) is not None:
            return manifest
        idle = [i for i in missing if not _at_work(folder, i % world)]
        if idle and time.monotonic() - begun > _STARTING:
            raise CacheError(
                f"{folder}: rank {idle[0] % world} of {world} stopped before {shard_name(idle[0])} "
                "was finished. Start it again with the same settings: what is finished is kept"
            )
        time.sleep(0.2)


def _at_work(folder: Path, rank: int) -> bool:
    with (folder / _LOCK.format(rank=rank)).open("a") as file:
        return not _locked(file)
