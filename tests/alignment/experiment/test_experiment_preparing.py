"""Base seeds whose organisms miss a gate are refused, only those, and before any student is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.prepare_models import select_seeds
from fastdistill.alignment.experiment.source import SourceRecord
from fastdistill.alignment.statistics import Gate, Validity

BAD = {3, 4, 8}


@dataclass(frozen=True)
class Made:
    """A source that is made by writing its name."""

    base_seed: int
    bad: frozenset[int] = field(default_factory=lambda: frozenset(BAD))
    gated: bool = True

    def prepare(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / str(self.base_seed)).touch()

    def cache(self, folder):
        return folder / f"models-{self.base_seed}"

    def cached(self, folder):
        if not (folder / str(self.base_seed)).is_file():
            raise FileNotFoundError
        value = 0.7 if self.base_seed in self.bad else 1.0
        gate = Gate(name="capability", value=value, bound=0.95, at_least=True)
        return SourceRecord(readings={}, validity=Validity(gates=(gate,)) if self.gated else None)


def made(*base_seeds: int, **options: Any) -> list[Any]:
    """Sources that have what `select_seeds` uses of one."""
    return [Made(seed, **options) for seed in base_seeds]


def seeds(sources):
    return [source.base_seed for source in sources]


def test_the_first_that_pass_are_taken_and_no_more_are_made(tmp_path):
    selected, refused = select_seeds(made(*range(1, 11)), 4, tmp_path)
    assert seeds(selected) == [1, 2, 5, 6]
    assert refused == {3: ["capability: 0.700, expected ≥ 0.95"], 4: refused[3]}
    assert sorted(int(p.name) for p in (tmp_path / "sources").iterdir()) == [1, 2, 3, 4, 5, 6]
    assert select_seeds(made(*range(1, 11)), 4, tmp_path, Execution(only_report=True)) == (
        selected,
        refused,
    )


def test_where_too_few_pass_nobody_is_refused_and_the_report_is_invalid(tmp_path):
    """Otherwise an experiment would quietly be one of fewer seeds than was asked for."""
    selected, refused = select_seeds(made(*range(1, 5)), 4, tmp_path)
    assert (seeds(selected), refused) == ([1, 2, 3, 4], {})
    selected, refused = select_seeds(made(3, 4), 1, tmp_path)
    assert (seeds(selected), refused) == ([3], {})


def test_models_that_nobody_gates_are_taken(tmp_path):
    selected, refused = select_seeds(made(3, gated=False), 1, tmp_path)
    assert (seeds(selected), refused) == ([3], {})
