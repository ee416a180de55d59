"""Faults that need no root, at fixed moments; `python -m faults` has the others."""

from __future__ import annotations

import random
import sys

import pytest

from faults import cases
from faults.campaign import judge, table, undisturbed
from faults.cases import Case
from faults.tasks import TASKS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Results of undisturbed runs, each made once."""
    made = {}

    def of(task):
        if task not in made:
            made[task] = undisturbed(task, tmp_path_factory.mktemp("undisturbed") / "run").result
        return made[task]

    return of


def fixed(*names: str) -> list[Case]:
    """Every fourth case at a fixed moment of these tasks; `python -m faults` runs them all."""
    rng = random.Random(5)
    every = [cases.kill_at(task, n) for task in names for n in (2, 7, 12, 20, 33)]
    every += [*cases.wrong_weights(), *cases.bad_teachers(rng), *cases.out_of_memory(rng, 0)]
    every += [*cases.clock_jumps(dict.fromkeys(TASKS, 0.3)), *cases.deleted_files(rng, 1)]
    return [case for case in every if case.task in names][::4]


def name_of(case: Case) -> str:
    return f"{case.kind}, {case.task}, {case.name}"


def check(case, tmp_path, expected):
    outcome = judge(case, tmp_path / "run", expected(case.task))
    assert outcome.failure is None, outcome.trace


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("case", fixed("quantize"), ids=name_of)
def test_quantizing_to_a_folder(case, tmp_path, expected):
    check(case, tmp_path, expected)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("case", fixed("cache"), ids=name_of)
def test_building_a_cache(case, tmp_path, expected):
    check(case, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", fixed("train"), ids=name_of)
def test_training(case, tmp_path, expected):
    check(case, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases.dead_ranks(random.Random(1), 2)), ids=name_of)
def test_a_rank_that_dies(case, tmp_path, expected):
    check(case, tmp_path, expected)


def test_a_fault_that_breaks_something_fails(tmp_path, expected):
    """The campaign sees files that differ, unclear errors, and silence."""
    silent = Case(kind="k", task="quantize", name="n", error="words", must_stop=True)
    assert judge(silent, tmp_path / "1", expected("quantize")).failure is not None

    def unclear(folder):
        raise KeyError("lm_head")

    bad = Case(kind="k", task="quantize", name="n", error="words", fault=unclear)
    outcome = judge(bad, tmp_path / "2", expected("quantize"))
    assert outcome.failure == "unclear error: KeyError: 'lm_head'"
    plain = Case(kind="k", task="quantize", name="n", error="words")
    differs = judge(plain, tmp_path / "3", expected("quantize") | {"int8/config.json": "0"})
    assert differs.failure == "differs in int8/config.json"
    good = judge(plain, tmp_path / "4", expected("quantize"))
    assert table([outcome, differs, good]).splitlines()[-1] == "| k | 3 | 1 | 0 | 2 |"
