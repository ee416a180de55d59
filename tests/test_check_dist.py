"""The script that checks a release's files: their version, and the C++ extension in wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.project_files import ROOT

WHEEL, SDIST = "fastdistill-1.2.3-cp311-cp311-linux_x86_64.whl", "fastdistill-1.2.3.tar.gz"
EXTENSION = "fastdistill/runtime/_ext.cpython-311-x86_64-linux-gnu.so"
STUB = "fastdistill/runtime/_ext.pyi"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a bash script")


def check(
    folder: Path, wheels: dict[str, list[str]], version: str | None = "v1.2.3"
) -> tuple[int, str]:
    """Return (exit code, errors) for a dist/ with an sdist and wheels of these files.

    The commands of pip and twine do nothing.
    """
    (folder / ".ci").mkdir()
    (folder / "dist").mkdir()
    (folder / "bin").mkdir()
    (folder / "demo_teacher").mkdir()
    shutil.copy(ROOT / ".ci" / "check-dist", folder / ".ci")
    shutil.copy(ROOT / "demo_teacher" / "pyproject.toml", folder / "demo_teacher")
    (folder / "dist" / SDIST).write_bytes(b"")
    for name, files in wheels.items():
        with zipfile.ZipFile(folder / "dist" / name, "w") as file:
            for each in files:
                file.writestr(each, "")
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" != zipfile ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "VERSION"}
    env["PATH"] = f"{folder / 'bin'}{os.pathsep}{env['PATH']}"
    if version is not None:
        env["VERSION"] = version
    result = subprocess.run(
        [str(folder / ".ci" / "check-dist")], env=env, capture_output=True, text=True
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("version", ["1.2.3", "v1.2.3"])
def test_files_of_the_version_pass(tmp_path: Path, version: str) -> None:
    assert check(tmp_path, {WHEEL: [EXTENSION, STUB]}, version) == (0, "")


def test_a_wheel_without_the_extension_fails(tmp_path: Path) -> None:
    code, errors = check(tmp_path, {WHEEL: [STUB]})
    assert code == 1
    assert errors == f"error: dist/{WHEEL} has no C++ extension\n"


def test_a_file_of_another_version_fails(tmp_path: Path) -> None:
    code, errors = check(tmp_path, {WHEEL: [EXTENSION]}, "v1.2.4")
    assert code == 1
    assert errors.count("is no distribution of version 1.2.4") == 2


def test_another_file_fails(tmp_path: Path) -> None:
    code, errors = check(tmp_path, {"other-1.2.3-py3-none-any.whl": [EXTENSION]})
    assert code == 1
    assert "other-1.2.3-py3-none-any.whl is no distribution" in errors


def test_a_version_is_required(tmp_path: Path) -> None:
    code, errors = check(tmp_path, {WHEEL: [EXTENSION]}, None)
    assert code != 0
    assert "expected the version of the files in dist/" in errors


def test_the_demos_teacher_has_its_own_version(tmp_path: Path) -> None:
    teacher = "fastdistill_demo_teacher-1.0-py3-none-any.whl"
    assert check(tmp_path, {WHEEL: [EXTENSION], teacher: []}) == (0, "")


def test_another_version_of_the_demos_teacher_fails(tmp_path: Path) -> None:
    code, errors = check(tmp_path, {"fastdistill_demo_teacher-0.9-py3-none-any.whl": []})
    assert code == 1
    assert "fastdistill_demo_teacher-0.9-py3-none-any.whl is no distribution" in errors
