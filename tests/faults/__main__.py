"""PYTHONPATH=tests python -m faults: the campaign and its table. Needs root on Linux."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .campaign import campaign, table


def main() -> int:
    cli = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--count", type=int, default=2, help="random cases of each kind and task")
    cli.add_argument("--kinds", default="", help="regular expression for the kinds of faults")
    cli.add_argument("--tasks", default="", help="regular expression for the tasks")
    options = cli.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        outcomes = campaign(
            options.seed, options.count, Path(folder), kinds=options.kinds, tasks=options.tasks
        )
    print(table(outcomes))
    return int(any(outcome.failure is not None for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
