"""Which implementation `impl` means, and that an explicit one is never replaced by another."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from triton import knobs

import fastdistill as fd
from fastdistill.runtime import backend
from helpers.cases import case, top_k


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    backend.triton_problem.cache_clear()
    yield
    backend.triton_problem.cache_clear()


@pytest.mark.usefixtures("no_interpreter")
def test_triton_on_a_cpu_is_refused_and_auto_is_torch():
    assert backend.resolve_impl("auto", torch.device("cpu")) == "torch"
    with pytest.raises(
        ValueError, match=r"impl: 'triton' cannot run: the Triton kernels need a CUDA"
    ):
        backend.resolve_impl("triton", torch.device("cpu"))
    c = case()
    with pytest.raises(ValueError, match="Use impl='torch'"):
        fd.topk_distill_loss(c.hidden, c.weight, top_k(c.teacher_logits, 5), impl="triton")


def test_auto_is_torch_on_a_cpu_even_under_the_interpreter():
    assert backend.resolve_impl("auto", torch.device("cpu")) == "torch"


def test_other_devices_and_old_gpus_are_named(monkeypatch):
    backend.triton_problem.cache_clear()
    with pytest.raises(ValueError, match=r"the Triton kernels need a CUDA GPU, not 'mps'"):
        backend.resolve_impl("triton", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\) is below \(8, 0\)"):
        backend.resolve_impl("triton", torch.device("cuda", 0))
    assert backend.resolve_impl("auto", torch.device("cuda", 0)) == "torch"
    backend.triton_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert backend.resolve_impl("auto", torch.device("cuda", 0)) == "triton"
    backend.triton_problem.cache_clear()


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend.triton_problem.cache_clear()
    with pytest.raises(ValueError, match="triton is not installed"):
        backend.resolve_impl("triton", torch.device("cuda", 0))
    backend.triton_problem.cache_clear()


@pytest.mark.fast_cases(1)
@pytest.mark.skipif(backend.extension() is None, reason="the C++ extension was not built")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FASTDISTILL_CPU_ISA": "scalar"}, "scalar CPU"),
        ({"FASTDISTILL_NO_EXT": "1"}, "None TORCH"),
        ({"FASTDISTILL_CPU_ISA": "sse9"}, "FASTDISTILL_CPU_ISA: expected one of scalar"),
    ],
    ids=str,
)
def test_the_environment_chooses_the_cpu_kernels(variables, expected):
    code = (
        "import torch\n"
        "from fastdistill.runtime import backend\n"
        "from fastdistill.quant.backends import table as engines\n"
        "chosen = engines.engine_for(torch.device('cpu'))\n"
        "name = 'CPU' if chosen is engines.CPU else 'TORCH'\n"
        "print(backend.describe()['cpu_isa'], name)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert expected in ran.stdout + ran.stderr
