"""The host code of every kernel through Triton's own compiler and launcher, over a stub driver."""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import gpu_steps
from helpers import host_path

ROOT = Path(__file__).resolve().parents[2]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    if reason := host_path.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("stub")
    return ctypes.CDLL(str(host_path.compile_stub(folder, "libstub.so")))


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


BF16, WIDE_SWIZZLE = 9, 3
GOOD_MAP = {
    "address": 4096,
    "sizes": (4096, 128256),
    "strides": (8192,),
    "box": (64, 256),
    "steps": (1, 1),
    "interleave": 0,
}
BAD_MAPS = [
    ({"address": 0}, "not at 16 bytes"),
    ({"address": 4104}, "not at 16 bytes"),
    ({"address": 4112, "interleave": 2}, "not at 32 bytes"),
    ({"sizes": (0, 5)}, "size 0 is 0"),
    ({"strides": (8200,)}, "stride 0 is 8200 bytes"),
    ({"strides": (8208,), "interleave": 2}, "stride 0 is 8208 bytes"),
    ({"box": (64, 257)}, "box 1 is 257"),
    ({"box": (4, 64)}, "the inner box has 8 bytes"),
    ({"box": (128, 64)}, "the inner box has 256 bytes"),
    ({"steps": (9, 1)}, "element stride 0 is 9"),
    ({"sizes": (8,) * 6}, "rank 6"),
]


@pytest.mark.parametrize(("change", "reason"), [({}, ""), *BAD_MAPS], ids=str)
def test_a_tensor_map_that_a_driver_refuses_is_an_error(stub, change, reason):
    m, text = {**GOOD_MAP, **change}, ctypes.c_char_p()
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = ctypes.c_void_p(-(-ctypes.addressof(memory) // 64) * 64)
    rank, wide, narrow = len(m["sizes"]), ctypes.c_uint64, ctypes.c_uint32
    failed = stub.cuTensorMapEncodeTiled(
        aligned,
        BF16,
        rank,
        ctypes.c_void_p(m["address"]),
        (wide * 6)(*m["sizes"]),
        (wide * 6)(*m["strides"]),
        (narrow * 6)(*m["box"]),
        (narrow * 6)(*m["steps"]),
        m["interleave"],
        WIDE_SWIZZLE,
        0,
        0,
    )
    stub.cuGetErrorString(failed, ctypes.byref(text))
    assert (failed != 0) == bool(change)
    assert reason in (text.value or b"").decode()


def test_a_null_pointer_is_an_error():
    host_path.refuse_null("some", {"p_ids": torch.empty(4, 0), "p_x": torch.empty(3), "p_b": None})
    with pytest.raises(ValueError, match="some: p_x: expected a tensor in memory"):
        host_path.refuse_null("some", {"p_x": torch.empty(0, 3)})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_is_compiled_and_launched(stub):
    """In a process of its own: the driver is one for all of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "helpers" / "host_path.py"
    done = subprocess.run(
        [sys.executable, str(script), "--cached"],
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
    if triton.__version__ == gpu_steps.TRITON:
        assert {name: group["variants"] for name, group in counts.items()} == gpu_steps.VARIANTS
