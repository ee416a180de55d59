"""python -m benchmarks, and `fastdistill bench`: measure, print and write results.

A name is an op (measured at --shape, --tokens and --k), a suite with its own shapes, or a study
(such as gradient_error). The default is sparse_loss and gradient_error, for the README.
`plot` measures nothing: it draws docs/pictures/loss.svg and, once there are results of
benchmarks.real_model, docs/pictures/real-model.svg.
`predict` measures nothing: it prints what the losses should take on a GPU that nobody measured yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rows import Row
    from .run import Measured

DEFAULT = ("gradient_error", "sparse_loss")
STUDIES = {
    "gradient_error": "every divergence with bf16 operands against fp64",
    "tile_skipping": "what grad_filter_eps saves and costs",
    "quant_fidelity": "what each quantization does to a trained model",
    "qad": "quantization-aware distillation against rounding once",
    "teacher_topk": "top-k answers of a whole teacher",
    "teacher_cache": "the cost of storing and reading a teacher's answers",
    "train_step": "a whole training step, and its memory",
    "attention": "attention of transformers on a CPU: sdpa next to eager",
    "host_time": "what the host adds to a loss on a GPU: with and without a CUDA graph",
    "large_teacher": "answers of teachers of 8 and 32 billion parameters, on a GPU",
    "large_student": "a step of an 8B student with a 32B teacher, and the longest row that fits",
}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {text}")
    return value


def study(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def parser(prog: str) -> argparse.ArgumentParser:
    from .shapes import DTYPES, HEADS

    cli = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    cli.add_argument("--shape", choices=HEADS, help="model that the head belongs to (qwen3-0.6b)")
    cli.add_argument("--tokens", type=positive, metavar="N", help="tokens (1024)")
    cli.add_argument("--k", type=positive, help="teacher ids per token (64)")
    cli.add_argument("--dtype", choices=DTYPES, help="dtype of hidden states and head (bf16)")
    cli.add_argument(
        "--quick", action="store_true", help="small shapes, no compilation, written only with --out"
    )
    cli.add_argument("--repeats", type=positive, default=7, help="turns of each contender (7)")
    cli.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="start no case after S seconds",
    )
    cli.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of results (benchmarks/results)"
    )
    cli.add_argument("--commit", help="commit to record if git is not available")
    cli.add_argument("--json", action="store_true", help="print one JSON document, no table")
    cli.add_argument("--list", action="store_true", help="list what can be measured, and exit")
    return cli


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Return 0: measured; 1: the gate rejected a case. argparse exits with 2 on a wrong request."""
    parse = parser(prog)
    args = parse.parse_args(argv)
    started = time.monotonic()

    from .ops import OPS
    from .shapes import FIXED_K, SUITES

    if args.list:
        _list(args.json)
        return 0
    if args.names == ["plot"]:
        return _plot()
    if args.names == ["predict"]:
        from .predict import report

        print(report(args.json))
        return 0
    known = {*OPS, *SUITES, *STUDIES}
    names = list(dict.fromkeys(args.names or DEFAULT))
    for name in names:
        if name not in known:
            parse.error(f"unknown benchmark {name!r}; --list names them")
    shape_options = [o for o in ("shape", "tokens", "k", "dtype") if getattr(args, o) is not None]
    non_ops = [name for name in names if name not in OPS]
    if shape_options and non_ops:
        parse.error(f"--{shape_options[0]} is for ops; {non_ops[0]} has shapes of its own")
    fixed = [name for name in names if name in FIXED_K]
    if args.k is not None and fixed:
        parse.error(f"--k is not for {fixed[0]}, whose K is {FIXED_K[fixed[0]]}")
    if args.k == 1 and "renorm_both" in names:
        parse.error("renorm_both needs --k 2 or more: one token renormalized over itself is 1")

    from . import rows

    rows.commit_override = args.commit
    bench = _Bench(args, names, started + args.budget_seconds)
    all_rows, refused, not_run = [], [], []
    for name in names:
        measured = bench.measure(name)
        all_rows += measured.rows
        refused += measured.refused
        not_run += measured.not_run
        if not args.json:
            show = study(name).table if name in STUDIES else rows.table
            print(show(measured.rows), end="\n\n")
    if args.json:
        document = {
            "rows": rows.records(all_rows),
            "refused": refused,
            "not_run": not_run,
        }
        print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    for line in refused:
        _say(f"refused: {line}")
    for line in not_run:
        _say(f"not run, out of time: {line}")
    return 1 if refused else 0


def _plot() -> int:
    from fastdistill.runtime.json_text import read_json

    from .readme_plot import write
    from .registry import Missing
    from .rows import RESULTS

    try:
        print(write())
        if (RESULTS / "real_model.json").is_file():
            from .real_model import save_picture

            print(save_picture(read_json(RESULTS / "real_model.json", dict)))
    except Missing as reason:
        _say(str(reason))
        return 1
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Bench:
    """The measurements of one command: rates once, then each name into its own files."""

    def __init__(self, args: argparse.Namespace, names: list[str], deadline: float) -> None:
        from .ops import OPS
        from .registry import cases
        from .roofline import measure_rates
        from .run import clock
        from .shapes import SUITES, entry

        self.args, self.deadline = args, deadline
        self.cases = {}
        for name in names:
            if name in STUDIES:
                continue
            at = (args.shape or "qwen3-0.6b", args.tokens or 1024, args.k or 64)
            entries = SUITES.get(name) or (entry(name, *at, args.dtype or "bf16"),)
            self.cases[name] = list(dict.fromkeys(cases(entries, OPS, args.quick)))
        if self.cases:
            self.timer = clock()
            dtypes = [case.dtype for name_cases in self.cases.values() for case in name_cases]
            self.rates = measure_rates(dtypes, self.timer.time)
            _say(f"measured here: {self.rates}")

    def measure(self, name: str) -> Measured:
        import torch

        from .registry import Missing
        from .rows import RESULTS, write
        from .run import Measured, measure_all

        folder = self.args.out or (None if self.args.quick else RESULTS)
        # Results of a GPU do not overwrite those of a CPU.
        file = name + "_cuda" * torch.cuda.is_available()

        def save(rows: list[Row]) -> None:
            if folder is not None:
                write(rows, folder / file)

        if name in STUDIES:
            from .shapes import GATE

            if time.monotonic() >= self.deadline:
                return Measured([], [], [name])
            module = study(name)
            rows = module.rows(GATE if self.args.quick else module.SHAPE)
            save(rows)
            return Measured(rows, [], [])
        measured = measure_all(
            self.cases[name],
            self.args.repeats,
            deadline=self.deadline,
            say=_say,
            save=save,
            rates=self.rates,
            timer=self.timer,
        )
        if folder is not None:
            from .plot import png

            try:
                _say(f"  {png(measured.rows, folder / (file + '.png'))}")
            except Missing as reason:
                _say(f"  {reason}")
        return measured


def _list(as_json: bool) -> None:
    from .ops import OPS
    from .shapes import HEADS, SUITES, label

    if as_json:
        document = {
            "ops": {
                name: {
                    "about": op.about,
                    "mode": op.mode,
                    "implementations": [c.impl for c in op.contenders],
                }
                for name, op in OPS.items()
            },
            "suites": {
                name: [
                    {"op": e.op, **asdict(e.shape), "dtype": e.dtype, "compiled": e.compiled}
                    for e in entries
                ]
                for name, entries in SUITES.items()
            },
            "shapes": {name: head._asdict() for name, head in HEADS.items()},
            "other": list(STUDIES),
        }
        print(json.dumps(document, indent=1, ensure_ascii=False))
        return
    print("ops, each at --shape, --tokens, --k and --dtype")
    for name, op in OPS.items():
        print(f"  {name:14} {op.about}")
        print(f"  {'':14} {', '.join(c.impl for c in op.contenders)}")
    for name, entries in SUITES.items():
        print(f"{name}: a suite of {len(entries)} cases")
        for e in entries:
            print(f"  {e.op:14} {label(e.shape)} {e.dtype}")
    for name, about in STUDIES.items():
        print(f"{name}: {about}")
    print("shapes: " + ", ".join(f"{n} (H={h.H}, V={h.V})" for n, h in HEADS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
