"""The CUDA module, compiled for GPUs that are not here, and every way to leave it out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from helpers.present import present

ROOT = Path(__file__).resolve().parents[2]
TREE = ["csrc", "LICENSE", "README.md", "pyproject.toml", "setup.py", "fastdistill/__init__.py"]
ARCHS = [80, 89, 90, 100]

pytestmark = [
    pytest.mark.skipif(
        not all(importlib.util.find_spec(m) for m in ("setuptools", "pybind11")),
        reason="builds without isolation, so it needs setuptools and pybind11 here",
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the CUDA module is built on Linux only"),
]

# What setup.py would build, and then the CUDA module alone: the C++ extension has tests of its own.
SETUP = """
import json, runpy, setuptools, sys
real, step = setuptools.setup, sys.argv[1]
def setup(ext_modules, **options):
    print(json.dumps({e.name: getattr(e, "nvcc", None) for e in ext_modules}), flush=True)
    if step == "build":
        cuda = [e for e in ext_modules if e.name == "fastdistill.runtime._cuda"]
        real(ext_modules=cuda, **options)
setuptools.setup = setup
sys.argv = "setup.py -q build_ext --build-lib lib --build-temp temp".split()
runpy.run_path("setup.py", run_name="__main__")
"""
# Knows two architectures and fails on everything that is not a question.
FAKE_NVCC = """#!/bin/sh
case "$1" in
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
  --dryrun) ;;
  *) echo "fake nvcc: no" >&2; exit 3 ;;
esac
"""


class Setup(NamedTuple):
    code: int
    output: str
    modules: dict[str, list[str] | None]


def setup(tree: Path, step: str = "plan", **env: str) -> Setup:
    """Run setup.py in `tree` with the variables that it reads as given, else unset."""
    ours = ("FASTDISTILL_", "CUDA_", "NVCC_", "CC", "CXX")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", SETUP, step],
        cwd=tree,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "Traceback" not in done.stderr, done.stderr
    first = done.stdout.partition("\n")[0]
    modules = json.loads(first) if first.startswith("{") else {}
    return Setup(done.returncode, done.stderr + done.stdout.removeprefix(first), modules)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("tree")
    (at / "fastdistill").mkdir()
    for name in TREE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, at / name)
    fake = at / "fake" / "bin" / "nvcc"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE_NVCC)
    fake.chmod(0o755)
    return at


def without_nvcc() -> str:
    parts = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(p for p in parts if not Path(p, "nvcc").exists())


def line_of(output: str, words: str) -> str:
    matches = [line for line in output.splitlines() if words in line]
    assert len(matches) == 1, output
    return matches[0]


def test_zero_leaves_it_out(tree: Path):
    done = setup(tree, FASTDISTILL_CUDA="0", CUDA_HOME=str(tree / "fake"))
    assert done.code == 0
    assert list(done.modules) == ["fastdistill.runtime._ext"]
    assert "FASTDISTILL_CUDA=0" in line_of(done.output, "WITHOUT the CUDA kernels")


def test_no_nvcc_is_an_error_only_where_it_is_asked_for(tree: Path):
    done = setup(tree, PATH=without_nvcc())
    assert done.code == 0
    assert list(done.modules) == ["fastdistill.runtime._ext"]
    assert "no nvcc on PATH" in line_of(done.output, "WITHOUT the CUDA kernels")
    done = setup(tree, PATH=without_nvcc(), FASTDISTILL_CUDA="1")
    assert done.code == 1
    assert "FASTDISTILL_CUDA=1 asks for the CUDA kernels, but no nvcc on PATH" in done.output
    assert "install the CUDA toolkit or set CUDA_HOME" in done.output


@pytest.mark.parametrize(
    "env, words",
    [
        ({"FASTDISTILL_CUDA": "yes"}, "FASTDISTILL_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"FASTDISTILL_CUDA_ARCHS": "sm_90"}, "capabilities like '80;89;90;100', got 'sm_90'"),
        ({"FASTDISTILL_CUDA_ARCHS": ""}, "capabilities like '80;89;90;100', got ''"),
        ({"FASTDISTILL_CUDA_ARCHS": "90;70"}, "does not compile for 70; it knows 80;90"),
    ],
)
def test_refusals(tree: Path, env: dict[str, str], words: str):
    done = setup(tree, CUDA_HOME=str(tree / "fake"), **env)
    assert done.code == 1
    assert words in done.output


def test_architectures(tree: Path):
    home = str(tree / "fake")
    done = setup(tree, CUDA_HOME=home)
    assert "89, 100, which this nvcc does not know" in line_of(done.output, "no CUDA kernels for")
    command = present(done.modules["fastdistill.runtime._cuda"])
    assert command[0] == str(tree / "fake" / "bin" / "nvcc")
    assert [a.partition("=")[2] for a in command if a.startswith("-gencode")] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]
    done = setup(tree, CUDA_HOME=home, FASTDISTILL_CUDA_ARCHS="80")
    command = present(done.modules["fastdistill.runtime._cuda"])
    assert "-gencode=arch=compute_80,code=compute_80" in command
    assert not [a for a in command if "compute_90" in a]


def test_a_failing_nvcc_is_an_error_only_where_it_is_asked_for(tree: Path):
    done = setup(tree, "build", CUDA_HOME=str(tree / "fake"))
    assert done.code == 0
    assert "nvcc" in line_of(done.output, "WITHOUT the CUDA kernels")
    assert not list(tree.glob("lib/**/_cuda*"))
    done = setup(tree, "build", CUDA_HOME=str(tree / "fake"), FASTDISTILL_CUDA="1")
    assert done.code == 1
    assert "FASTDISTILL_CUDA=1 asks for the CUDA kernels, but" in done.output


@pytest.fixture(scope="module")
def built(tree: Path) -> Path:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    done = setup(tree, "build", FASTDISTILL_CUDA="1", FASTDISTILL_CUDA_ARCHS="80;89;90;100")
    assert done.code == 0, done.output
    assert done.output.strip() == "", "the compilers warned"
    (module,) = tree.glob("lib/fastdistill/runtime/_cuda*.so")
    return module


@pytest.fixture(scope="module")
def dump(built: Path):
    bundled = importlib.util.find_spec("triton")
    tools = Path(present(bundled.origin)).parent / "backends/nvidia/bin" if bundled else ""
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=tools)
    if tool is None:
        pytest.skip("no cuobjdump")

    return lambda *options: subprocess.check_output([tool, *options, built], text=True)


@pytest.fixture(scope="module")
def module(built: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fastdistill.runtime._cuda", built)
    module = importlib.util.module_from_spec(present(spec))
    present(present(spec).loader).exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
class TestBuilt:
    def test_machine_code_for_every_architecture_and_ptx_for_later_ones(self, dump):
        machine = {int(a) for a in re.findall(r"\.sm_(\d+)\.cubin", dump("--list-elf"))}
        assert machine == set(ARCHS)
        assert {int(a) for a in re.findall(r"\.sm_(\d+)\.ptx", dump("--list-ptx"))} == {ARCHS[-1]}

    def test_nothing_spills(self, dump):
        row = r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)"
        usage = re.findall(row, dump("--dump-resource-usage"))
        pieces = [name for name, *_ in usage if "expand_pieces" in name]
        assert len(pieces) == 5 * 2 * len(ARCHS), "five types, plain and nested"
        assert not [(name, s, l) for name, _, s, l in usage if s != "0" or l != "0"]
        assert max(int(registers) for _, registers, *_ in usage) <= 64

    def test_products_and_sums_are_not_contracted(self, dump):
        functions = dump("-sass", "-arch", "sm_90").split("Function : ")[1:]
        expanding = [f for f in functions if "expand_" in f.partition("\n")[0]]
        assert len(expanding) == 2 * 5 * 2
        assert not [f.partition("\n")[0] for f in expanding if re.search(r"\bFFMA", f)]

    def test_imports_without_a_driver(self, module):
        assert module.build_info()["archs"] == ARCHS
        assert re.fullmatch(r"\d+\.\d+", module.build_info()["cuda"])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
    def test_a_call_without_a_driver_says_so(self, module):
        with pytest.raises(RuntimeError, match=r"^lut4_dequant: .*\(cudaError\w+\)$"):
            module.lut4_dequant(256, 256, 0, 256, 256, 1, 64, 64, 64, 0, 0)
        with pytest.raises(RuntimeError, match=r"^lut4_dequant_nested: .*\(cudaError\w+\)$"):
            module.lut4_dequant_nested(
                256, 256, 256, 256, 256, 256, 0, 256, 256, 1, 64, 64, 64, 0, 0
            )
        with pytest.raises(RuntimeError, match=r"^quantize_rows: .*\(cudaError\w+\)$"):
            module.quantize_rows(256, 1, 256, 4, 256, 1, 64, 0)

    def test_refusals_come_before_any_launch(self, module):
        good = dict(qdata=0, scale=0, offset=0, lut=0, out=0, out_kind=1, count=64, block=64)
        good |= dict(cols=64, row_inv=0, stream=0)
        for change, words in (
            ({"count": -1}, "count: expected a number >= 0"),
            ({"block": 0}, "block: expected a number >= 1"),
            ({"out_kind": 5}, "out_kind: expected 0 fp32, 1 bf16, 2 fp16, 3 fp8-e4m3fn or 4 int8"),
            ({"row_inv": 256}, "row_inv: expected with 8-bit results only"),
            ({"count": 2**40, "block": 2**39}, r"block: expected count \* block < 2\^63"),
        ):
            with pytest.raises(ValueError, match=words):
                module.lut4_dequant(**good | change)
        with pytest.raises(ValueError, match="q_kind: expected 3 fp8-e4m3fn or 4 int8"):
            module.quantize_rows(0, 1, 0, 1, 0, 1, 64, 0)
        module.lut4_dequant(**good | {"count": 0})
        module.quantize_rows(0, 1, 0, 4, 0, 0, 64, 0)

    @pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
    def test_its_cuda_runtime_is_its_own(self, built: Path):
        """torch loads a runtime of perhaps another version: not one symbol may resolve there."""
        symbols = subprocess.check_output(["nm", "-D", built], text=True)
        assert "PyInit__cuda" in symbols
        assert not re.findall(r" (?:cuda|__cuda)\w+", symbols)
