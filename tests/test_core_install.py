"""What runs on torch alone, on the extra [cache], and what a missing extra says."""

from __future__ import annotations

from pathlib import Path

from helpers.blocked_imports import OF_EXTRAS, run_without
from helpers.served import vllm
from helpers.source_imports import PACKAGE, imports_of
from helpers.training import peaked

OF_CACHE = ("filelock", "numpy", "safetensors")
BEYOND_CACHE = [name for name in OF_EXTRAS if name not in OF_CACHE]

LOSSES = """
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


def test_no_module_needs_a_unix():
    for path in PACKAGE.rglob("*.py"):
        assert not [i for i in imports_of(path) if i.target.partition(".")[0] == "fcntl"], path
