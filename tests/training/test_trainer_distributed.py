"""Two processes make the update that one makes: data-parallel, sharded, vocabulary-parallel.

Accelerate shards models on accelerators only and says so on CPUs; `ON_CPU` lifts that for gloo. The
sharding itself is torch's own, as on GPUs.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version

from helpers.processes import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
]


def compare(one, two):
    (alone_weights, alone), (together_weights, together) = one, two
    assert (alone_weights - together_weights).abs().max() < 1e-6
    for ours, theirs in zip(alone["logs"], together["logs"], strict=True):
        assert ours["target_tokens"] == theirs["target_tokens"]
        for name in ("loss", "divergence", "nll", "teacher_mass", "student_mass"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # Seven examples over two processes: one is read twice, and must be counted once.
    for name, counts in alone["counts"].items():
        # A score at an edge may fall on either side of it.
        apart = sum(abs(a - b) for a, b in zip(counts, together["counts"][name], strict=True))
        assert sum(counts) == sum(together["counts"][name])
        assert apart <= 4, name
    for name in ("loss", "kl", "nll", "top1", "agreement", "teacher_mass"):
        ours, theirs = alone["metrics"][f"eval_{name}"], together["metrics"][f"eval_{name}"]
        assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, each made once."""
    made = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[key] = launch(folder, 1, "ddp", 12, 1, **options)
        return made[key]

    return run


ON_POLICY = {"lmbda": 0.5, "max_new_tokens": 5, "max_steps": 4}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("options", [{}, ON_POLICY, {"packing": True}], ids=str)
def test_two_data_parallel_processes(tmp_path, alone, options):
    """Ranks with different numbers of targets are averaged by target, not by rank."""
    reference = {name: v for name, v in options.items() if name != "packing"}
    compare(alone(**reference), launch(tmp_path / "two", 2, "ddp", 3, 2, **options))


def test_two_processes_share_batches_by_length(tmp_path, alone):
    # The 12 rows make four batches: an update of two processes with two each has all rows.
    two = launch(tmp_path / "two", 2, "ddp", 8, 2, max_tokens_per_batch=63)
    compare(alone(), two)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("options", [{}, {"tied": True}, ON_POLICY], ids=str)
def test_two_shards_of_fsdp2(tmp_path, alone, options):
    two = launch(tmp_path / "two", 2, "fsdp2", 3, 2, **options)
    compare(alone(**options), two)
    assert two[1]["seen"]["sharded"]  # released behind the step
    # Never twice in a pass, and not again for its backward: four micro-batches take one each.
    assert 4 <= two[1]["seen"]["head_gathered"] <= two[1]["seen"]["passes"]


def test_a_head_sharded_by_itself(tmp_path, alone):
    """A policy may wrap the head alone, which then frees it behind its forward."""
    compare(alone(), launch(tmp_path / "two", 2, "fsdp2_every_linear", 3, 2))


@pytest.mark.fast_cases(1)
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older transformers shard even vocabularies only, or by another interface",
)
@pytest.mark.parametrize("options", [{}, ON_POLICY], ids=str)
def test_a_vocabulary_over_two_ranks(tmp_path, alone, options):
    """Tensor parallelism: each rank has half of the head's rows, and both read the same batch."""
    two = launch(tmp_path / "two", 2, "tensor_parallel", 6, 2, **options)
    compare(alone(**options), two)
    assert two[1]["seen"]["rows"] == 27  # of 53


@pytest.mark.parametrize("options", [{}, {"from_path": True}, ON_POLICY], ids=str)
def test_two_partitions_of_zero3(tmp_path, alone, options):
    pytest.importorskip("deepspeed")
    reference = {name: v for name, v in options.items() if name != "from_path"}
    compare(alone(**reference), launch(tmp_path / "two", 2, "zero3", 3, 2, **options))
