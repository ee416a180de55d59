"""The links of the package's metadata start with the address of the repository that builds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.project_files import ROOT


@pytest.mark.parametrize("repository", ["", "https://example.org/team/fastdistill/"])
def test_links_are_those_of_the_building_repository(tmp_path: Path, repository: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"FASTDISTILL_REPOSITORY": repository, "FASTDISTILL_NO_EXT": "1"},
        check=True,
        capture_output=True,
    )
    (metadata,) = tmp_path.glob("*.egg-info/PKG-INFO")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    urls = [line for line in lines if line.startswith("Project-URL: ")]
    if repository:
        assert "Project-URL: Issues, https://example.org/team/fastdistill/issues" in urls
        assert len(urls) == 4
    else:
        assert urls == []
