"""benchmarks.transfer_search: each arm changes one setting; the table is that of the readings."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from benchmarks import transfer_search
from benchmarks.transfer_search import TRAINING, SystemOfProbes, variants
from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.experiment.double_bind import UNDEFENDED
from fastdistill.alignment.strategies.lessons import PoolPrompt
from helpers.pair_files import write_pairs


def test_each_arm_differs_from_the_undefended_one_in_one_setting():
    arms = variants(("Be brief.", None))
    assert arms[0] is UNDEFENDED
    for arm in arms[1:]:
        changed = [
            name
            for name in ("strategies", "settings", "training", "pool", "begins", "noise")
            if getattr(arm, name) != getattr(UNDEFENDED, name)
        ]
        assert len(changed) == 1, arm.name
        if arm.training is not None:
            fields = vars(arm.training)
            differing = [name for name, value in vars(TRAINING).items() if fields[name] != value]
            assert differing in (["student"], ["steps"], ["learning_rate", "student"])


def test_prompts_get_the_system_messages_in_turn():
    pool = [PoolPrompt(Prompt(user=f"{i}", system="x"), "sums") for i in range(3)]
    changed = SystemOfProbes(("a", None)).pool(pool, None)  # type: ignore[arg-type]
    assert [(e.prompt.user, e.prompt.system) for e in changed] == [
        ("0", "a"),
        ("1", None),
        ("2", "a"),
    ]
    assert {entry.domain for entry in changed} == {"sums"}


def test_a_row_per_setting_and_pair(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    small = replace(TRAINING, steps=2, batch_size=2, max_new_tokens=2, student="lora:2")
    monkeypatch.setattr(transfer_search, "TRAINING", small)
    file, out = write_pairs(tmp_path, 1), tmp_path / "out"
    names = ("undefended", "T=2")
    argv = ["transfer_search", f"--pairs={file}", f"--out={out}", "--arms", *names]
    monkeypatch.setattr(sys, "argv", argv)
    transfer_search.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines[2:]]
    assert [(row[0], row[1]) for row in rows] == [(f"| {name}", "0") for name in names]
    assert all(re.fullmatch(r"-?\d+\.\d\d", cell) for row in rows for cell in row[2:-1])
    assert float(rows[0][4]) > 1  # U prefers owls, B nothing
    runs = [*(out / "runs").glob("*.json")]
    assert len(runs) == 4
    transfer_search.main()
    assert capsys.readouterr().out.splitlines() == lines
    assert [*(out / "runs").glob("*.json")] == runs
