"""Command line: `fastdistill` or `python -m fastdistill`."""

import sys

from ..runtime.optional import MissingExtra
from .extras import command_needs


def main() -> None:
    """Run the console script."""
    try:
        with command_needs():
            from .app import main as run
    except MissingExtra as error:
        print(f"fastdistill: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    run()


__all__ = ["main"]
