"""`fastdistill cache build`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from ..hf.encoder import Encoder
from ..hf.open_dataset import open_dataset
from ..hf.positions import check_row_lengths
from ..hf.source import SETTINGS, source_of
from ..runtime.backend import rank_and_world
from ..teachers.cache import TeacherCache
from ..teachers.cache.build import Examples, check_existing_build
from ..teachers.cache.manifest import read_settings
from ..teachers.cache.settings import BuildOptions, settings_for, tokenizer_for
from ..teachers.http import ServedTeacher, is_url
from ..teachers.local import load_teacher
from ..training.teacher_setup import TeacherSpec
from .loaders import as_exit_code_1, device, open_tokenizer, outline_teacher
from .printing import say
from .run_cache import figures, show
from .verbs import CacheBuild


def run(options: CacheBuild, extra: dict[str, Any]) -> dict[str, Any] | None:
    data = _load_data(options)
    teacher = load_teacher(
        options.teacher,
        quant=options.teacher_quant,
        compute=options.teacher_compute,
        device=device(),
    )
    rank, world = rank_and_world()
    stopped = f"cache build: stopped; finished files stay in {options.out}"
    with as_exit_code_1(stopped), _report_interruption(options):
        cache = TeacherCache.build(
            teacher,
            data,
            options.out,
            k=options.k,
            temperatures=options.temperatures,
            targets=options.targets,
            positions=options.positions,
            tokenizer=None if options.tokenizer is None else open_tokenizer(options.tokenizer),
            max_length=options.max_length,
            completion_only_loss=options.completion_only_loss,
            chat_template=options.chat_template,
            seed=options.seed,
            shard_mb=options.shard_mb,
            rank=rank,
            world=world,
        )
    return figures(cache) if rank == 0 else None


@contextmanager
def _report_interruption(options: CacheBuild) -> Iterator[None]:
    """Print on Ctrl-C how many files are finished and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        files = len(list(options.out.glob("*.safetensors")))
        message = "No file was finished."
        if files:
            message = f"{files} files are finished. Re-run the same command to resume."
        say(f"fastdistill: cache build: stopped. {message}", file=sys.stderr)
        raise


def dry_run(options: CacheBuild, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the estimated tokens and bytes of a build; needs no weights."""
    data = _load_data(options)
    teacher = outline_teacher(options.teacher, options.teacher_quant, options.teacher_compute)
    vocab = teacher.vocab_size
    tokenizer = None if options.tokenizer is None else open_tokenizer(options.tokenizer)
    encoder = Encoder(
        tokenizer=tokenizer_for(teacher, tokenizer),
        completion_only=options.completion_only_loss,
        max_length=options.max_length,
        chat_template=options.chat_template,
    )
    for index in range(len(data)):
        encoder(data[index], index, "data")  # raises for a row that the build would reject
    values = vars(options)
    names = (field.name for field in fields(BuildOptions) if field.name in values)
    build_options = BuildOptions(**{name: values[name] for name in names})
    source = None if isinstance(teacher, TeacherSpec) else teacher
    settings, bytes_per_row = settings_for(source, Examples(data, encoder), build_options, vocab)
    if isinstance(teacher, ServedTeacher):
        check_row_lengths("dataset", data, encoder, [teacher.row_limit])
        for temperature in options.temperatures:
            teacher.check(k=options.k, temperature=temperature)
        teacher.close()
    # A model whose weights are not loaded has no digest: take the one of the unfinished build.
    if source is None and (options.out / SETTINGS).is_file():
        settings = replace(settings, teacher=read_settings(options.out).teacher)
    check_existing_build(options.out, settings)
    size = bytes_per_row * settings.rows
    return {
        "dry_run": True,
        "rows": settings.rows,
        "tokens": round(size / settings.bytes_per_token),
        "bytes": round(size),
        "shards": settings.shards,
    }


def print_result(result: dict[str, Any]) -> None:
    if not result.get("dry_run"):
        show(result)
        return
    size = f"{result['bytes'] / 1e6:,.1f} MB in {result['shards']} files"
    say(f"{result['rows']:,} rows, about {result['tokens']:,} tokens: {size}")


def _load_data(options: CacheBuild) -> Any:
    source_of("teacher", options.teacher)  # a typo is no tokenizer's or data's error
    data = open_dataset(options.data)
    needs_tokenizer = is_url(options.teacher) and options.tokenizer is None
    if needs_tokenizer and any(data[i].get("input_ids") is None for i in range(len(data))):
        raise ValueError(
            "tokenizer: expected the teacher's tokenizer, to encode text for a server, got none. "
            "Pass --tokenizer, or rows with input_ids"
        )
    return data
