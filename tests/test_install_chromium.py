"""The CI script that installs a browser, run with fake commands on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.browser import NAMES

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "install-chromium"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a bash script")


def install(folder: Path, **commands: str) -> tuple[str, list[str]]:
    """Run the script with these commands only; return its output and the calls of apt-get."""
    bash, log = shutil.which("bash"), folder / "calls"
    assert bash is not None
    for name, body in commands.items():
        file = folder / name.replace("_", "-")
        file.write_text(f'#!{bash}\necho "$@" >> {log}\n{body}\n')
        file.chmod(0o755)
    result = subprocess.run(
        [bash, str(SCRIPT)], env={"PATH": str(folder)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    calls = log.read_text().splitlines() if log.exists() else []
    return result.stdout, [call for call in calls if call != "-u"]


def test_root_on_debian_installs_chromium(tmp_path: Path) -> None:
    output, calls = install(tmp_path, id="echo 0", apt_get="echo noise; echo noise >&2")
    assert output == ""
    assert calls == ["update", "install -y --no-install-recommends chromium"]


def test_a_failed_installation_prints_one_line(tmp_path: Path) -> None:
    output, calls = install(tmp_path, id="echo 0", apt_get="exit 100")
    assert output.count("\n") == 1
    assert "are skipped" in output
    assert calls == ["update"]


@pytest.mark.parametrize("browser", NAMES)
def test_a_browser_that_is_there_is_used(tmp_path: Path, browser: str) -> None:
    (tmp_path / browser).write_text("")
    (tmp_path / browser).chmod(0o755)
    assert install(tmp_path, id="echo 0", apt_get="") == ("", [])


@pytest.mark.parametrize("commands", [{"id": "echo 1000", "apt_get": ""}, {"id": "echo 0"}])
def test_other_users_and_systems_install_nothing(tmp_path: Path, commands: dict[str, str]) -> None:
    assert install(tmp_path, **commands) == ("", [])
