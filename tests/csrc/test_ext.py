"""The compiled module: what it says about this CPU agrees with what the kernel says."""

from __future__ import annotations

import importlib.util
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.present import present

if importlib.util.find_spec("fastdistill.runtime._ext") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from fastdistill import linear_topk
from fastdistill.runtime import _ext

CPUINFO = Path("/proc/cpuinfo")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")


def test_cpu_features_are_named_booleans():
    features = _ext.cpu_features()
    assert isinstance(features, dict)
    assert all(type(name) is str and type(here) is bool for name, here in features.items())
    assert features is not _ext.cpu_features(), "a caller's changes must not stick"
    if X86:
        assert {"avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"} <= set(
            features
        )
    else:
        assert set(features) <= {"neon"}


@pytest.mark.skipif(not (X86 and CPUINFO.exists()), reason="needs /proc/cpuinfo of an x86 machine")
def test_cpu_features_agree_with_the_kernel():
    line = present(re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE))
    flags = set(line[1].split())
    assert _ext.cpu_features() == {name: name in flags for name in _ext.cpu_features()}


@pytest.mark.skipif(not X86, reason="x86 only")
def test_wider_sets_imply_what_they_are_built_on():
    features = _ext.cpu_features()
    for name, base in [("avx2", "avx"), ("avx512f", "avx2"), ("avx512_vnni", "avx512f")]:
        assert features[base] or not features[name]


def test_build_info_names_the_toolchain():
    info = _ext.build_info()
    assert set(info) == {"compiler", "cpp_standard", "openmp"}
    assert re.match(r"(gcc|clang|msvc) \d+", str(info["compiler"]))
    assert re.fullmatch(r"C\+\+(17|20|23)", str(info["cpp_standard"]))
    assert type(info["openmp"]) is bool


def test_topk_on_a_cpu_runs_the_kernel_of_the_extension(monkeypatch):
    rows = []

    def recorded(*arguments):
        rows.append(arguments[3])
        return _ext.lse_topk(*arguments)

    extension = SimpleNamespace(**(vars(_ext) | {"lse_topk": recorded}))
    monkeypatch.setattr("fastdistill.runtime.backend.extension", lambda: extension)
    linear_topk(torch.randn(5, 8), torch.randn(40, 8), k=4)
    assert rows == [5]
