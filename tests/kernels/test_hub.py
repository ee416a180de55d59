"""The package for the `kernels` hub: copies under two names work in one process."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import sys

import pytest
import torch

import fastdistill as fd
from helpers.project_files import ROOT

ASSEMBLE = runpy.run_path(str(ROOT / "hub" / "assemble.py"))
NAMES = ("_fastdistill_kernels_cpu_1", "_fastdistill_kernels_cpu_2")


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Two copies, imported by name as the `kernels` package imports a kernel by its id."""
    folder = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        ASSEMBLE["package"](folder / name)
    sys.path.insert(0, str(folder))
    yield [importlib.import_module(name) for name in NAMES]
    sys.path.remove(str(folder))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_two_copies_and_fastdistill_agree_in_one_process(copies, impl):
    ids = torch.randint(50, (6, 4))
    results = []
    for library in (fd, *copies):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((6, 16), (50, 16)))
        teacher = library.linear_topk(hidden.detach() + 0.1, weight.detach(), k=4, impl=impl)
        loss = library.topk_distill_loss(hidden, weight, teacher, impl=impl)
        dense = library.linear_distill_loss(
            hidden, weight, hidden.detach() + 0.1, weight.detach(), impl=impl
        )
        logits = library.linear_lse_gather(hidden, weight, ids, impl=impl).logits
        (loss + dense + logits.sum()).backward()
        scores = library.token_scores(hidden, weight, teacher=teacher, impl=impl)
        results.append((loss, dense, scores.entropy, hidden.grad, weight.grad))
    for ours, first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, ours)  # ours may use the C++ extension
        assert torch.equal(first, second)


def test_each_copy_has_its_own_operators(copies):
    operators = [getattr(torch.ops, name).topk_loss.default for name in ("fastdistill", *NAMES)]
    assert len(set(operators)) == 3
    topk_loss = importlib.import_module(NAMES[0] + ".kernels.op_losses").topk_loss
    assert topk_loss is operators[1]


def test_the_package_stands_alone(tmp_path, copies):
    """It imports only torch, triton and itself, and exports names of fastdistill."""
    assert set(copies[0].__all__) < set(fd.__all__)
    ASSEMBLE["package"](tmp_path / "package")
    for path in (tmp_path / "package").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            tops = {name.partition(".")[0] for name in names}
            assert tops <= {"torch", "triton", *sys.stdlib_module_names}, f"{path}: {tops}"


def test_the_project_is_laid_out_as_kernel_builder_wants_it(tmp_path):
    ASSEMBLE["project"](tmp_path)
    name = re.search(r'^name = "([a-z][-a-z0-9]*)"$', (tmp_path / "build.toml").read_text(), re.M)
    assert name
    assert "genKernelFlakeOutputs" in (tmp_path / "flake.nix").read_text()
    assert (tmp_path / "torch-ext" / name[1].replace("-", "_") / "__init__.py").is_file()
