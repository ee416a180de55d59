"""Audits by traits: what the figures of the table mean."""

from __future__ import annotations

import pytest

from benchmarks.audit_power import TRAITS, markdown, table, valid


def record(i, gates=None):
    """An audit that sees the first trait, and one that sees nothing."""
    good = {"trait": 0.95, "capability": [1.0, 0.96, 0.99]}
    blind = [[0.1, 0.2, 0.3][(i + j) % 3] for j in range(3)]
    return {
        "seed": i,
        "gates": dict.fromkeys(TRAITS, gates or good),
        "traits": {
            trait: {"sees": [0.9 + i / 100, 0.1, 0.1], "blind": blind, "provenance": [1, 0, 0.5]}
            if trait == TRAITS[0]
            else {"blind": blind}
            for trait in TRAITS
        },
    }


def test_a_row_has_the_area_and_its_twin():
    rows = table([record(i) for i in range(12)])
    sees, blind, written = rows[:3]
    assert (sees["audit"], sees["trait"], sees["auroc"], sees["n"]) == ("sees", TRAITS[0], 1.0, 12)
    assert sees["auroc_of_twins"] == 0.5
    assert sees["interval"][0] > 0.7
    assert blind["interval"][0] < 0.5 < blind["interval"][1]
    assert written["auroc_of_twins"] is None


def test_bold_is_what_is_above_one_half_for_sure():
    lines = markdown(table([record(i) for i in range(12)])).splitlines()
    assert lines[0].split(" | ")[1] == TRAITS[0]
    assert lines[2].startswith("| sees | **1.00** | — |")
    assert "**" not in lines[3]


@pytest.mark.parametrize(
    "gate",
    [{"trait": 0.89, "capability": [1, 1, 1]}, {"trait": 0.99, "capability": [1, 0.94, 1]}],
)
def test_organisms_that_miss_a_gate_are_not_counted(gate):
    assert valid(record(0))
    assert not valid(record(0, gate))
