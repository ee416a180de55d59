"""Every Triton kernel, in every form it is launched, compiled for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers import aot
from helpers.aot import exceeds, recorded, table, with_table

TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # per block, CUDA programming guide
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
GEMMS = ("filtered_product",)
# What the machine code of every variant has on an H200. At least so many loads and stores of 16
# bytes, at most so many barriers, and matrix instructions of at least so many columns.
FACTS = {
    "expand": {"barriers": 1},
    "finish_topk": {"barriers": 15},
    "filtered_product": {"loads": 32, "stores": 8, "barriers": 10, "columns": 128},
    "gather_rows": {"barriers": 7},
    "grad_divergence": {"loads": 4, "stores": 1, "barriers": 1},
    "grad_rows": {"loads": 4, "stores": 2, "barriers": 2},
    "merge_slots": {"barriers": 0},
    "quantize_row": {"loads": 8, "barriers": 2},
    "reduce_groups": {"loads": 1, "barriers": 3},
    "reduce_rows": {"loads": 1, "barriers": 32},
    "scale_in_place": {"loads": 2, "stores": 2, "barriers": 0},
    "scatter_hidden": {"barriers": 10},
    "sum_divergence": {"loads": 4, "barriers": 5},
    "sum_parts": {"barriers": 2},
    "sum_runs": {"barriers": 0},
    "token_loss": {"barriers": 17},
    "token_scores": {"barriers": 23},
}
IN_PLACE = ("grad_rows", "grad_divergence")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def rows():
    """In a process of its own, where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).resolve().parents[1] / "helpers" / "aot.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, TARGETS)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def name(row):
    return f"{row['kernel']} sm_{row['target']} {row['key']}"


def test_every_kernel_of_the_sources_was_compiled(rows):
    kernels = set()
    for path in Path(__file__).resolve().parents[2].glob("kernels/*.py"):
        kernels.update(re.findall(r"launch\(\s*\"triton_\w+:(\w+)\"", path.read_text()))
    assert {r["kernel"] for r in rows} == kernels == FACTS.keys()
    counts = Counter(r["target"] for r in rows)
    assert len(set(counts.values())) == 1


def test_shared_memory_fits(rows):
    over = [name(r) for r in rows if r["shared"] > SHARED_LIMIT[r["target"]]]
    assert not over


def test_nothing_spills(rows):
    spilled = [name(r) for r in rows if r["stack"] or r["local_memory"]]
    assert not spilled


def test_the_gemms_use_the_matrix_units(rows):
    gemms = [r for r in rows if r["kernel"] in GEMMS]
    assert {r["kernel"] for r in gemms} == set(GEMMS)
    for row in gemms:
        assert row["matrix"] == [MATRIX[row["target"]]], name(row)


@pytest.mark.parametrize("kernel", FACTS)
def test_the_machine_code_is_as_meant(rows, kernel):
    limits = FACTS[kernel]
    variants = [r for r in rows if r["kernel"] == kernel and r["target"] == 90]
    assert variants
    for row in variants:
        order = row["order"]
        assert order.count("L") >= limits.get("loads", 0), name(row)
        assert order.count("S") >= limits.get("stores", 0), name(row)
        assert order.count("B") <= limits["barriers"], name(row)
        assert min(row["product_columns"], default=0) >= limits.get("columns", 0), name(row)


def test_rows_are_loaded_before_they_are_overwritten(rows):
    """A 16-bit row is written over its own fp32 row, by other threads: a barrier is between."""
    for row in rows:
        if row["kernel"] in IN_PLACE:
            assert re.search("LB+S", row["order"]), name(row)
            assert "LS" not in row["order"], name(row)


def test_quantised_weights_are_not_contracted(rows):
    """A product fused with a sum would differ in bits from the CPU and from PyTorch."""
    fused = [name(r) for r in rows if r["kernel"] == "expand" and r["fma"]]
    assert not fused


def test_registers_are_those_recorded(rows):
    """More of them means fewer programs at once; `python tests/helpers/aot.py 80 90 100 --record`
    after a change that is meant."""
    import triton

    kernels = recorded(triton.__version__)
    if kernels is None:
        pytest.skip(f"nothing is recorded with triton {triton.__version__}")
    measured = table(rows)
    assert measured.keys() == kernels.keys()
    for kernel, targets in measured.items():
        for target, seen in targets.items():
            allowed = kernels[kernel][target]
            assert seen["variants"] == allowed["variants"], (kernel, target)
            assert not exceeds(seen, allowed), (kernel, target, seen, allowed)


def test_an_older_triton_is_recorded_where_it_needs_more(monkeypatch, tmp_path):
    def kernels(registers, shared=0):
        return {"a": {"90": {"registers": registers, "shared": shared, "variants": 7}}}

    def more(registers, shared=0):
        return {"a": {"90": {"registers": registers, "shared": shared}}}

    old = {"triton": "3.7.1", "kernels": kernels(60), "older": {"3.6.0": more(99)}}
    assert with_table(old, "3.6.0", kernels(64))["older"] == {"3.6.0": {}}
    assert with_table(old, "3.6.0", kernels(60, 1))["older"] == {"3.6.0": more(60, 1)}
    new = with_table(old, "3.6.0", kernels(65))
    assert new["older"] == {"3.6.0": more(65)}
    assert with_table(new, "3.10.0", kernels(5)) == new | {
        "triton": "3.10.0",
        "kernels": kernels(5),
    }
    monkeypatch.setattr(aot, "RECORD", tmp_path / "record.json")
    aot.RECORD.write_text(json.dumps(new))
    assert (recorded("3.7.1"), recorded("3.6.0")) == (kernels(60), kernels(65))
    assert recorded("3.5.0") is None
