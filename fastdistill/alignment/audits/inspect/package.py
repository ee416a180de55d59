"""Import of the optional package Inspect AI, with installation advice where it is missing."""

from __future__ import annotations

from ....runtime.optional import require

_INSTALL = "'fastdistill[inspect]' (Python 3.11 or newer)"

inspect_ai = require("inspect_ai", "inspect", _INSTALL)
for _part in ("dataset", "log", "model", "scorer", "solver", "tool", "util"):
    require(f"inspect_ai.{_part}", "inspect", _INSTALL)
