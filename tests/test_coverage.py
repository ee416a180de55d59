"""The settings of coverage count the kernels under one name, and the processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.project_files import ROOT

coverage = pytest.importorskip("coverage")

PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], cwd=sys.argv[2], check=True)
"""
CHILD = "import fastdistill.kernels.token_loss, fastdistill.runtime.json_text"


def test_a_started_process_is_counted_and_the_link_is_resolved(tmp_path: Path) -> None:
    script, data = tmp_path / "parent.py", tmp_path / "data"
    script.write_text(PARENT)
    # Without the variables of a measurement that this test may run in.
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    env |= {"COVERAGE_FILE": str(data), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "coverage", "run", "--rcfile=pyproject.toml", str(script)]
    subprocess.run([*command, CHILD, str(tmp_path)], cwd=ROOT, env=env, check=True)
    files = set()
    for path in tmp_path.glob("data*"):
        measured = coverage.CoverageData(str(path))
        measured.read()
        # Files that nothing imported are listed too, without lines.
        run = [file for file in measured.measured_files() if measured.lines(file)]
        files |= {Path(file).relative_to(ROOT).as_posix() for file in run}
    assert {"kernels/token_loss.py", "fastdistill/runtime/json_text.py"} <= files
    assert not [file for file in files if file.startswith("fastdistill/kernels/")]
