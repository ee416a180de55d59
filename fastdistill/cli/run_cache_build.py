"""`fastdistill cache build`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..backend import rank_and_world
from ..cache import TeacherCache
from ..cache.build import check_begun
from ..cache.manifest import SETTINGS, read_settings
from ..cache.prepare import settings_for
from ..examples import Encoder, check_example
from ..json_lines import JsonLines
from ..plan.shapes import config_of
from ..positions import check_row_lengths
from ..served import ServedTeacher, is_url
from .opening import device, elsewhere, quiet, running, teacher_of, tokenizer_of
from .printing import say
from .run_cache import figures, show
from .verbs import CacheBuild


def run(own: CacheBuild, more: dict[str, Any]) -> dict[str, Any] | None:
    quiet()
    data = _data(own)
    teacher = teacher_of(own.teacher, own.teacher_quant, own.teacher_compute, device())
    rank, world = rank_and_world()
    stopped = f"cache build: stopped, and what is finished stays in {own.out}"
    with running(stopped), _interrupted(own):
        cache = TeacherCache.build(
            teacher,
            data,
            own.out,
            k=own.k,
            temperatures=own.temperatures,
            targets=own.targets,
            positions=own.positions,
            tokenizer=None if own.tokenizer is None else tokenizer_of(own.tokenizer),
            max_length=own.max_length,
            completion_only_loss=own.completion_only_loss,
            seed=own.seed,
            shard_mb=own.shard_mb,
            rank=rank,
            world=world,
        )
    return figures(cache) if rank == 0 else None


@contextmanager
def _interrupted(own: CacheBuild) -> Iterator[None]:
    """Say what an interrupted build leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        files = len(list(own.out.glob("*.safetensors")))
        left = "Nothing was finished."
        if files:
            left = f"The same command goes on behind the {files} files that are finished."
        say(f"fastdistill: cache build: stopped. {left}", file=sys.stderr)
        raise


def dry(own: CacheBuild, more: dict[str, Any]) -> dict[str, Any]:
    """How many tokens and bytes it would be, from a look at some examples; no weights."""
    quiet()
    data = _data(own)
    teacher = elsewhere(own.teacher, own.teacher_quant, own.teacher_compute)
    if teacher is None:
        vocab = config_of("teacher", own.teacher).get_text_config().vocab_size
    else:
        vocab = teacher.vocab_size
    name = own.tokenizer or (own.teacher if teacher is None else None)
    encoder = Encoder(
        tokenizer=None if name is None else tokenizer_of(name),
        completion_only=own.completion_only_loss,
        max_length=own.max_length,
    )
    for at in range(len(data)):
        encoder(data[at], at, "data")  # as the build would, so that none is refused later
    settings, bytes_per_row = settings_for(
        teacher, data, encoder, vocab=vocab, k=own.k, temperatures=own.temperatures,
        targets=own.targets, positions=own.positions, seed=own.seed, shard_mb=own.shard_mb,
    )  # fmt: skip
    if isinstance(teacher, ServedTeacher):
        check_row_lengths("dataset", data, encoder, [teacher.row_limit])
        for temperature in own.temperatures:
            teacher.check(k=own.k, temperature=temperature)
        teacher.close()
    if (own.out / SETTINGS).is_file() and teacher is None:  # which weights it has is not known here
        settings = replace(settings, teacher=read_settings(own.out).teacher)
    check_begun(own.out, settings)
    size = bytes_per_row * settings.rows
    return {
        "dry_run": True,
        "rows": settings.rows,
        "tokens": round(size / settings.bytes_per_token),
        "bytes": round(size),
        "shards": settings.shards,
    }


def tell(found: dict[str, Any]) -> None:
    if not found.get("dry_run"):
        show(found)
        return
    size = f"{found['bytes'] / 1e6:,.1f} MB in {found['shards']} files"
    say(f"{found['rows']:,} rows, about {found['tokens']:,} answers: {size}")


def _data(own: CacheBuild) -> JsonLines:
    data = JsonLines(own.data, check=check_example)
    unread = is_url(own.teacher) and own.tokenizer is None
    if unread and any(data[at].get("input_ids") is None for at in range(len(data))):
        raise ValueError(
            "tokenizer: expected the teacher's, to read text for a server, got none. Pass "
            "--tokenizer, or lines with input_ids"
        )
    return data
