"""The commands of the quickstart, typed as they stand there into a shell."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.command import files

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
(BLOCK,) = re.findall(r"```sh\n(cd fastdistill-demo\n.*?)```", QUICKSTART, re.S)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.slow
def test_the_first_five_minutes(tmp_path):
    """Every line ends with exit code 0, and a browser would find what the page says is there."""
    files(tmp_path / "fastdistill-demo", rows=24)
    port = free_port()
    here = f"set -e; export PATH={Path(sys.executable).parent}:$PATH; trap 'kill 0' EXIT; set -v\n"
    typed = BLOCK.replace(":8000", f":{port}").replace("int8 &", f"int8 --port {port} &")
    assert typed.count(port) == 3
    script = f"{here}{typed}touch ../every-line\n"
    started = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
            timeout=280,
            start_new_session=True,
        )
    log = (tmp_path / "log").read_text()
    assert (tmp_path / "every-line").exists(), log
    assert time.monotonic() - started < 300
    folder = tmp_path / "fastdistill-demo"
    for run in ("run", "run-2"):
        assert (folder / run / "report.html").stat().st_size > 10_000, log
        assert (folder / run / "model.safetensors").is_file(), log
    assert (folder / "answers" / "manifest.json").is_file()
    assert "What this does not show" in (folder / "audit" / "report.html").read_text()
    assert re.search(r"fits 8\.\d* ?GB", log), log
    assert "files verified" in log
    assert "Traceback" not in log
    assert "\x1b" not in log


def test_its_commands_are_those_of_a_newcomer():
    """Nothing is asked for that was not there before it."""
    assert BLOCK.count("\n") <= 13  # the last one stops the server
    verbs = set(re.findall(r"^fastdistill (\w+)", BLOCK, re.M))
    assert verbs == {"doctor", "plan", "cache", "train", "report", "audit", "serve"}
