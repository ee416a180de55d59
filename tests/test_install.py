"""Every way to install, each from a copy of the tree so that the checkout stays as it is."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from helpers.blocked_imports import OF_EXTRAS, block

ROOT = Path(__file__).resolve().parent.parent
LOSS_TESTS = ("refusals", "scalars", "scores")
KERNELS = sorted(p.name for p in (ROOT / "kernels").glob("*.py"))
SHIPPED = ["setup.py", "constraints.txt", "LICENSE", "csrc/bind.cpp", "csrc/cpu_features.h"]
TREE = ["fastdistill", "kernels", "csrc", "LICENSE", "MANIFEST.in", "README.md"]
TREE += ["constraints.txt", "pyproject.toml", "setup.py"]

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("setuptools", "pybind11", "pip")),
    reason="builds without isolation, so it needs setuptools, pybind11 and pip here",
)
HERE = [p for p in sys.path if p.endswith("-packages")]
WHERE = "import {0} as a, fastdistill.kernels.token_loss as b; print(a.__file__, b.__file__)"
no_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
no_ext = {"FASTDISTILL_NO_EXT": "1"}


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def python_with(site_dir: Path, code: str, cwd: Path) -> str:
    """Run code against the package in site_dir, everything else coming from here.

    -S skips the .pth files of this environment: an editable fastdistill in it would answer for
    whatever site_dir lacks.
    """
    env = {"PYTHONPATH": os.pathsep.join([str(site_dir), *HERE])}
    return run(sys.executable, "-S", "-c", code, cwd=cwd, env=env)


def build(kind: str, tree: Path, out: Path, env: dict[str, str] | None = None) -> tuple[Path, str]:
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    log = run(sys.executable, "-c", code, cwd=tree, env=env)
    return out / log.split()[-1], log


def copy_tree(to: Path) -> Path:
    """What a fresh clone holds of the parts that are built, symlink included."""
    to.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "build", "*.egg-info")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the tree, unpacked."""
    at = tmp_path_factory.mktemp("sdist")
    archive, _ = build("sdist", copy_tree(at / "tree"), at / "dist")
    with tarfile.open(archive) as tar:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(at, **safe)
    return at / archive.name.removesuffix(".tar.gz")


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as z:
        return z.namelist()


def test_sdist_holds_the_sources_once(sdist: Path):
    for name in SHIPPED + [f"kernels/{k}" for k in KERNELS]:
        assert (sdist / name).is_file(), f"{name} is missing from the sdist"
    assert not (sdist / "fastdistill" / "kernels").exists(), "kernels/ would be there twice"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no compiler")
def test_wheel_from_sdist_works(sdist: Path, tmp_path: Path):
    wheel, _ = build("wheel", sdist, tmp_path / "dist")
    assert wheel.stat().st_size < 2_500_000
    names = names_in(wheel)
    assert not [n for n in names if n.endswith(".safetensors")]
    assert [n for n in names if n.startswith("fastdistill/kernels/")] == [
        f"fastdistill/kernels/{k}" for k in KERNELS
    ]
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "csrc/"))]
    assert f"fastdistill/runtime/_ext{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert "fastdistill/py.typed" in names
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    for file in python_with(
        tmp_path / "site", WHERE.format("fastdistill.runtime._ext"), tmp_path
    ).split():
        assert Path(file).is_relative_to(tmp_path / "site")


@pytest.mark.slow
def test_an_installed_wheel_passes_the_tests_of_the_losses_on_torch_alone(
    sdist: Path, tmp_path: Path
):
    """In a folder without the checkout, where importing a package of any extra fails.

    numpy stays: a fixture of the tests turns on torch's deterministic mode, which imports it.
    """
    wheel, _ = build("wheel", sdist, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    files = [f"tests/losses/test_{name}.py" for name in LOSS_TESTS]
    options = ["-q", "-m", "not slow", "-k", "not triton", "-p", "no:cacheprovider", *files]
    code = (
        block(name for name in OF_EXTRAS if name != "numpy") + "import fastdistill, pytest, torch\n"
    )
    code += f"print(fastdistill.__file__)\nraise SystemExit(pytest.main({options!r}))"
    log = python_with(tmp_path / "site", code, tmp_path)
    assert str(tmp_path / "site" / "fastdistill" / "__init__.py") in log.splitlines()
    assert re.search(r"^\d{3,} passed", log.splitlines()[-1]), log


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    "env, reason", [(no_compiler, "/bin/false"), (no_ext, "FASTDISTILL_NO_EXT=1")]
)
@pytest.mark.skipif(os.name == "nt", reason="CC and CXX mean nothing to MSVC")
def test_installs_without_a_compiler(env: dict[str, str], reason: str, tmp_path: Path):
    tree, site_dir = copy_tree(tmp_path / "tree"), tmp_path / "site"
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--target", site_dir]
    log = run(sys.executable, "-m", "pip", "install", *options, tree, cwd=tmp_path, env=env)
    warnings = [line for line in log.splitlines() if "WITHOUT the C++ extension" in line]
    assert warnings
    assert all(reason in line for line in warnings)
    assert not list((site_dir / "fastdistill" / "runtime").glob("_ext*.so"))
    code = "import fastdistill as f, fastdistill.runtime.backend as b\n"
    code += "print(f.__file__, b.extension())"
    file, extension = python_with(site_dir, code, tmp_path).split()
    assert Path(file).is_relative_to(site_dir)
    assert extension == "None"


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["checkout", "sdist"])
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(origin: str, mode: str, sdist: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    if origin == "sdist":
        shutil.copytree(sdist, tree)
    else:
        copy_tree(tree)
    at = tmp_path / "venv"
    venv.create(at, with_pip=False, symlinks=os.name != "nt")
    bin_dir = at / ("Scripts" if os.name == "nt" else "bin")
    where = run(bin_dir / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=at)
    # What is installed here, torch above all, without installing it again.
    Path(where.strip(), "here.pth").write_text("\n".join(HERE))
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    options += ["--config-settings", f"editable_mode={mode}"]
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python", "install"]
    run(*pip, *options, "-e", tree, cwd=tmp_path, env=no_ext)
    code = "import fastdistill, fastdistill.kernels.token_loss as module\n"
    code += "print(fastdistill.__file__, module.__file__)"
    for file in run(bin_dir / "python", "-c", code, cwd=at).split():
        assert Path(file).is_relative_to(tree)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("cwd", ["repository root", "elsewhere"])
def test_lives_beside_the_package_called_kernels(cwd: str, tmp_path: Path):
    """transformers imports a PyPI package `kernels`; our folder of that name must not shadow it."""
    dummy = tmp_path / "site" / "kernels"
    dummy.mkdir(parents=True)
    (dummy / "__init__.py").write_text("MARK = 'from PyPI'\n")
    # With -c the working directory comes first on sys.path, before the package.
    code = """
import kernels
import fastdistill.kernels.token_loss as module
print(kernels.MARK, module.__name__)
"""
    at = ROOT if cwd == "repository root" else tmp_path
    out = run(sys.executable, "-c", code, cwd=at, env={"PYTHONPATH": str(tmp_path / "site")})
    assert out.strip() == "from PyPI fastdistill.kernels.token_loss"
