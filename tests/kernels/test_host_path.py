"""The host code of every kernel through Triton's own compiler and launcher, over a stub driver."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import host_path

ROOT = Path(__file__).resolve().parents[2]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


@pytest.fixture
def stub(tmp_path):
    if reason := host_path.missing():
        pytest.skip(reason)
    return ctypes.CDLL(str(host_path.compile_stub(tmp_path, "libstub.so")))


def test_a_launch_that_a_driver_refuses_is_an_error(stub):
    module, text, shared_limit = ctypes.c_void_p(), ctypes.c_char_p(), 8
    assert stub.cuModuleLoadData(ctypes.byref(module), b"PTX") != 0
    assert stub.cuModuleLoadData(ctypes.byref(module), b"\x7fELF") == 0

    def launch(*config):
        arguments = ctypes.byref(LaunchConfig(*config)), module, None, None
        if not stub.cuLaunchKernelEx(*arguments):
            return "ok"
        stub.cuGetErrorString(1, ctypes.byref(text))
        assert text.value is not None
        return text.value.decode()

    assert launch(2**31 - 1, 65535, 1, 256, 1, 1, 48 << 10) == "ok"
    assert launch(1, 65536, 1, 256, 1, 1, 0) == "grid 1 x 65536 x 1"
    assert launch(0, 1, 1, 256, 1, 1, 0) == "grid 0 x 1 x 1"
    assert launch(1, 1, 1, 2048, 1, 1, 0) == "block 2048 x 1 x 1"
    assert launch(1, 1, 1, 256, 1, 1, 50_000) == "50000 bytes of shared memory, 49152 allowed"
    assert stub.cuFuncSetAttribute(module, shared_limit, 228 << 10) != 0
    assert stub.cuFuncSetAttribute(module, shared_limit, 227 << 10) == 0
    assert launch(1, 1, 1, 256, 1, 1, 227 << 10) == "ok"
    assert stub.stub_launched() == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_is_compiled_and_launched(stub):
    """In a process of its own: the driver is one for all of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "helpers" / "host_path.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    print(done.stdout)
    kernels = set()
    for path in ROOT.glob("kernels/*.py"):
        kernels.update(re.findall(r"launch\(\s*\"triton_\w+:(\w+)\"", path.read_text()))
    assert {*counts["losses"]["by_kernel"], *counts["quantized"]["by_kernel"]} == kernels
    for group in counts.values():
        assert group["launches"] >= group["variants"] > 0
