"""Teacher answers on disk: the cost of writing them and the speed of reading them.

    cache_build   a whole build, compared with Teacher.topk of the same rows in the same batches: a
                  Llama with Qwen's vocabulary and random weights
    cache_read    rows in random order, 16 per batch, as the trainer's workers read them: in this
                  process, in two, in two with the answers returned to this one; and Parquet in
                  whole row groups, its best case

N is the tokens of one pass: N / ms is thousands of tokens per second. output_mb is the size of the
cache; peak_mb is not measured. grad_error is the largest error of a probability; above MOST_ERROR
nothing is reported.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fastdistill as fd
from fastdistill import TopK

from .data import device
from .large_models import small_llama
from .peers import named
from .registry import GateError, attempt
from .rows import Row
from .rows import table as table_of
from .run import take_turns
from .shapes import Shape

SHAPE = Shape(N=1 << 20, H=512, V=151936, K=64)
ROW = 512
BATCH = 16
LAYERS = 8
BUILT = 8  # rows per build
TURNS = 5
MOST_ERROR = 1e-3  # fp16 log-probabilities


class _Peaked:
    """A teacher without a model: deterministic, peaked top-k answers."""

    def __init__(self, shape: Shape) -> None:
        self.vocab_size, self._k = shape.V, shape.K
        self._stride = shape.V // shape.K
        slots = torch.arange(1, shape.K + 1).float()
        self._logprobs = (0.97 * slots**-1.5 / (slots**-1.5).sum()).log()

    def topk(self, ids: Tensor, mask: Tensor | None = None, *, k: int, temperature: float) -> TopK:
        first = (ids * 2654435761) % self._stride
        named = first.unsqueeze(-1) + self._stride * torch.arange(k)
        logprobs = self._logprobs.expand(*ids.shape, k)
        tail = (1 - logprobs.exp().sum(-1)).log()
        return TopK(named, logprobs, tail, temperature)


def rows(shape: Shape = SHAPE) -> list[Row]:
    """Measure; a `shape` smaller than SHAPE uses few rows and a small model, for a test run."""
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as folder:
        return [*_build(shape, Path(folder)), *_read(shape, Path(folder))]


def _build(shape: Shape, folder: Path) -> list[Row]:
    small = shape != SHAPE
    teacher = fd.Teacher(small_llama(shape, 1 if small else LAYERS, 2 * ROW, seed=0))
    ids = torch.randint(shape.V, (2 if small else BUILT, ROW), device=device())
    data = [{"input_ids": row.cpu()} for row in ids]
    folders: list[Path] = []

    def build() -> None:
        folders.append(folder / f"build-{len(folders)}")
        fd.TeacherCache.build(teacher, data, folders[-1], k=shape.K)

    works: dict[str, Callable[[], object]] = {
        "Teacher.topk": lambda: teacher.topk(ids, k=shape.K),
        "TeacherCache.build": build,
    }
    rows = [_row("cache_build", name, ids.numel(), shape) for name in works]
    for work in works.values():
        work()
    cache = fd.TeacherCache(folders[0])
    rows[1].output_mb = cache.manifest.bytes / 1e6
    rows[1].grad_error = _error(cache.topk(ids.cpu(), k=shape.K), teacher.topk(ids, k=shape.K))
    take_turns(rows, works, 1 if small else TURNS)
    return rows


def _read(shape: Shape, folder: Path) -> list[Row]:
    count = max(shape.N // ROW, BATCH)
    ids = torch.randint(shape.V, (count, ROW), generator=torch.Generator().manual_seed(0))
    teacher, data = _Peaked(shape), [{"input_ids": row} for row in ids]
    cache = fd.TeacherCache.build(teacher, data, folder / "read", k=shape.K)
    few = ids[:BATCH]
    error = _error(cache.topk(few, k=shape.K), teacher.topk(few, k=shape.K, temperature=1.0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    batches = [ids[some] for some in order.split(BATCH)]

    def read_in_process() -> None:
        for batch in batches:
            cache.topk(batch, k=shape.K)

    def to_answers(batch: list[Tensor]) -> TopK:
        return cache.topk(batch[0], k=shape.K)

    def to_count(batch: list[Tensor]) -> int:
        return cache.topk(batch[0], k=shape.K).ids.numel()

    works: dict[str, Callable[[], object]] = {
        "one process": read_in_process,
        "two workers": _passes(batches, to_count),
        "two workers, handed over": _passes(batches, to_answers),
    }
    rows = [_row("cache_read", name, ids.numel(), shape) for name in works]
    rows[0].output_mb = cache.manifest.bytes / 1e6
    for row in rows:
        row.grad_error = error
    parquet = _row("cache_read", "Parquet, two workers", ids.numel(), shape)
    read_parquet, reason = attempt(lambda: _parquet(teacher, ids, folder / "p.parquet", shape.K))
    parquet.set_reason(reason)
    if read_parquet is not None:
        works[parquet.impl] = read_parquet
    for work in works.values():
        work()
    take_turns([*rows, parquet], works, 1 if shape != SHAPE else TURNS)
    return [*rows, parquet]


def _passes(batches: Any, collate: Callable[[Any], Any]) -> Callable[[], object]:
    """One pass through a loader with two persistent workers."""
    loader = DataLoader(
        batches, batch_size=1, num_workers=2, persistent_workers=True, collate_fn=collate
    )
    return lambda: deque(loader, maxlen=0)


def _parquet(teacher: _Peaked, ids: Tensor, file: Path, k: int) -> Callable[[], object]:
    table_of = named("pyarrow", "pyarrow", "table")
    writer_of, file_of = (
        named("pyarrow", "pyarrow.parquet", name) for name in ("ParquetWriter", "ParquetFile")
    )
    writer = None
    for some in ids.split(BATCH):
        answers = teacher.topk(some, k=k, temperature=1.0)
        columns = {"input_ids": some.int(), "ids": answers.ids.int(), "logprobs": answers.logprobs}
        table = table_of({name: list(c.flatten(1).numpy()) for name, c in columns.items()})
        writer = writer or writer_of(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()

    def group(batch: list[int]) -> int:
        table = file_of(file).read_row_group(batch[0], columns=["ids", "logprobs"])
        return sum(
            len(table[name].combine_chunks().flatten().to_numpy()) for name in table.column_names
        )

    order = torch.randperm(len(ids) // BATCH, generator=torch.Generator().manual_seed(1))
    return _passes(order.tolist(), group)


def _row(op: str, impl: str, tokens: int, shape: Shape) -> Row:
    return Row.at(replace(shape, N=tokens), op, impl, "forward", "float32")


def _error(answers: TopK, truth: TopK) -> float:
    order = truth.ids.sort(-1)
    if not torch.equal(answers.ids.long(), order.values.cpu()):
        raise GateError("teacher_cache: the ids are not the teacher's; nothing is reported")
    exact = truth.logprobs.cpu().gather(-1, order.indices.cpu()).exp()
    error = (answers.logprobs.exp() - exact).abs().max().item()
    if not error <= MOST_ERROR:
        raise GateError(f"teacher_cache: a probability is {error:.2g} off; nothing is reported")
    return error


def table(rows: list[Row]) -> str:
    lines = [table_of(rows), ""]
    for row in rows:
        if row.ms_median is not None and row.op == "cache_read":
            lines.append(f"{row.impl:26} {row.N / row.ms_median / 1e3:6.2f} million tokens/s")
    return "\n".join(lines)
