"""Result rows with their provenance; writing them and printing tables."""

from __future__ import annotations

import csv
import functools
import io
import json
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdistill.runtime.atomic_files import write_atomically
from fastdistill.runtime.backend import describe, package_versions

from .packages import installed
from .shapes import Shape, label

RESULTS = Path(__file__).parent / "results"
PEERS = ("liger-kernel", "trl", "cut-cross-entropy")
commit_override: str | None = None  # from --commit, for machines without git or the repository


@functools.cache
def current_machine() -> str:
    """The kind of machine, without its host name."""
    machine_info = describe()
    if machine_info["cuda"]:
        return str(machine_info["cuda"][0]["name"])
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    instructions = machine_info["cpu_isa"] or machine_info["cpu_capability"]
    return f"{model}, {machine_info['threads']} threads, {instructions}"


@functools.cache
def current_versions() -> dict[str, str | None]:
    return package_versions() | {name: installed(name) for name in PEERS}


@functools.cache
def current_commit() -> str:
    """The measured commit, marked if the working tree had changes at the first row."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        head = dirty = ""
    return head + (" with changes" if dirty else "") if head else commit_override or "unknown"


def current_command() -> str:
    if sys.argv[1:2] == ["bench"]:
        return shlex.join(["fastdistill", *sys.argv[1:]])
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


@dataclass
class Row:
    """One contender on one case. A missing one has a `reason` and no figures.

    note: a fallback for a missing package, or the time that the host needs.

    grad_error is ‖g − g₆₄‖ / ‖g₆₄‖ on the gate's shape, the worse of hidden's and weight's (in
    forward mode the worst of the outputs'). peak_mb is the memory that a call adds to torch's
    allocator; output_mb of it are the results. roofline_share is floor_ms / ms_median, with the
    floor from the rates below, measured in the same process.
    """

    op: str
    impl: str
    mode: str
    N: int
    H: int
    V: int
    K: int
    dtype: str
    missing: bool = False
    reason: str | None = None
    note: str | None = None
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ms_min: float | None = None
    runs: int | None = None
    timer: str | None = None
    peak_mb: float | None = None
    output_mb: float | None = None
    grad_error: float | None = None
    products_share: float | None = None  # share of gradient tiles multiplied, if some are skipped
    kl: float | None = None  # KL(full ‖ quantized), nats per token, and its 95 % interval
    kl_low: float | None = None
    kl_high: float | None = None
    top1_agreement: float | None = None
    roofline_share: float | None = None
    floor_ms: float | None = None
    gemm_tflops: float | None = None
    copy_gb_s: float | None = None
    predicted_ms: float | None = None  # on a known GPU: from `predict`, not measured
    predicted_host_ms: float | None = None
    machine: str = field(default_factory=current_machine)
    versions: dict[str, str | None] = field(default_factory=current_versions)
    commit: str = field(default_factory=current_commit)
    command: str = field(default_factory=current_command)

    @classmethod
    def at(cls, shape: Shape, op: str, impl: str, mode: str, dtype: str = "bfloat16") -> Row:
        """A row without figures."""
        return cls(op, impl, mode, **asdict(shape), dtype=dtype)

    @property
    def shape(self) -> Shape:
        return Shape(self.N, self.H, self.V, self.K)

    def set_reason(self, reason: str | None) -> None:
        """Mark the row as missing, unless the reason is None."""
        self.missing, self.reason = reason is not None, reason


def cell(value: Any) -> str:
    """A CSV cell: text unchanged, empty for null, other values as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=False)


PREDICTIONS = ("predicted_ms", "predicted_host_ms")


def records(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as JSON; fields of predictions only if a row has one."""
    predicted = any(row.predicted_ms is not None for row in rows)
    dropped = () if predicted else PREDICTIONS
    return [{k: v for k, v in asdict(row).items() if k not in dropped} for row in rows]


def write(rows: list[Row], stem: Path) -> list[Path]:
    """Write the rows to stem.json and stem.csv."""
    lines_of = records(rows)
    table = io.StringIO()
    names = list(lines_of[0]) if lines_of else [f.name for f in fields(Row)]
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(names)
    lines.writerows([cell(record[name]) for name in names] for record in lines_of)
    texts = {
        stem.with_name(f"{stem.name}.json"): json.dumps(lines_of, indent=1, allow_nan=False) + "\n",
        stem.with_name(f"{stem.name}.csv"): table.getvalue(),
    }
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def table(rows: list[Row]) -> str:
    """A text table; time and memory also as ratios to the first complete row of the case."""
    form = "{:12} {:22} {:>10} {:>7} {:>8} {:>7} {:>8} {:>9}"
    heads = ["op", "impl", "ms", "ratio", "MB", "ratio", "error", "roofline"]
    if any(row.predicted_ms is not None for row in rows):
        form, heads = form + " {:>12}", [*heads, "predicted ms"]
    lines = []
    first: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        case = (row.op, row.dtype, row.shape)
        if case not in first:
            lines += ["", f"{row.op}, {label(row.shape)}, {row.dtype}", form.format(*heads)]
            first[case] = row
        elif first[case].ms_median is None:
            first[case] = row
        base = first[case]
        if row.ms_median is None or base.ms_median is None:
            reason = (row.reason or "").partition(";")[0]
            lines.append(f"{row.op:12} {row.impl:22} missing: {reason}")
            continue
        memory, saved = ("—" if r.peak_mb is None else f"{r.peak_mb:.0f}" for r in (row, base))
        if saved not in ("—", "0"):
            saved = f"{(row.peak_mb or 0) / (base.peak_mb or 1):.2f}"
        share = "—" if row.roofline_share is None else f"{row.roofline_share:.1%}"
        error = "—" if row.grad_error is None else f"{row.grad_error:.1e}"
        lines.append(
            form.format(
                row.op,
                row.impl,
                f"{row.ms_median:.2f}",
                f"{row.ms_median / base.ms_median:.3f}",
                memory,
                saved,
                error,
                share,
                "—" if row.predicted_ms is None else f"{row.predicted_ms:.2f}",
            )
        )
    return "\n".join(lines[1:])
