"""python -m benchmarks [sparse_loss] [gradient_error]: run, print, write benchmarks/results/."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import gradient_error, registry, sparse_loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=["gradient_error", "sparse_loss"],
                        help="gradient_error, sparse_loss (default: both)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each contender")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--out", type=Path, default=registry.RESULTS, help="where JSON goes")
    args = parser.parse_args()
    for name in args.names:
        if name == "gradient_error":
            shape = registry.Shape(32, 64, 2000, 16) if args.quick else gradient_error.SHAPE
            rows = gradient_error.rows(shape)
            print(gradient_error.table(rows))
        elif name == "sparse_loss":
            shape = registry.Shape(128, 64, 8000, 16) if args.quick else sparse_loss.ISSUE_SHAPE
            rows = []
            for case in sparse_loss.cases(shape):
                rows += registry.measure(case, args.repeats)
            print(registry.table(rows))
        else:
            parser.error(f"unknown benchmark {name!r}")
        if not args.quick:
            registry.write(rows, args.out / f"{name}.json")


if __name__ == "__main__":
    main()
