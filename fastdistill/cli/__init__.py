"""Command line: `fastdistill` or `python -m fastdistill`."""

from .app import main

__all__ = ["main"]
