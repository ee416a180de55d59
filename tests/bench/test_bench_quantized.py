"""The benchmarks of quantised inference hold to the same gate as the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import data, qad, quant_fidelity, quant_peers, quantized, teacher_topk
from benchmarks.ops import OPS
from benchmarks.registry import Case, Contender, GateError, Op, cases, gate
from benchmarks.roofline import Rates
from benchmarks.rows import Row
from benchmarks.run import WallClock, fill_roofline, measure
from benchmarks.shapes import SUITES, Shape
from fastdistill.runtime import backend
from helpers.present import present

pytestmark = [
    pytest.mark.skipif(backend.extension() is None, reason="the C++ extension was not built"),
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
]
SMALL = Shape(N=8, H=128, V=96, K=0)
EXACT = {"dequant_nf4": "ours, reused", "linear_nf4": "exact", "linear_int8": "exact"}


@pytest.mark.parametrize("name", quantized.OPS)
def test_every_op_passes_its_gate(name):
    dtype = torch.float32 if name == "row_topk" else torch.bfloat16
    checked = gate(Case(name, OPS[name], Shape(8, 64, 100, 16), dtype))
    assert EXACT.get(name, "ours") in checked.errors
    if name.startswith("linear"):
        errors = {impl: present(error) for impl, error in checked.errors.items()}
        assert errors["exact"] < 3e-3 < errors["int8"] < 0.02
        assert 3e-3 < errors["full precision"] < 0.15


def test_wrong_weights_are_refused():
    op = OPS["linear_nf4"]
    wrong = Contender("wrong", quantized.layer(quant_peers.full), prepares=True)  # not NF4
    broken = Op(op.about, op.mode, op.make, op.truth, (wrong,), op.passes, op.bytes)
    with pytest.raises(GateError, match=r"wrong: error 0.09.* of out against fp64"):
        gate(Case("linear_nf4", broken, SMALL, torch.bfloat16))


def test_few_tokens_meet_cold_weights_and_layers_are_made_once():
    made = []

    def make(weight):
        made.append(weight)
        return lambda x: x

    some = data.Data(torch.zeros(1, 64), torch.zeros(4096, 64), torch.zeros(0))
    run = quantized.layer(make)
    run(some)
    copies = len(made)
    assert copies == 2 * quantized.COLD_BYTES // some.weight.numel()
    run(some)
    assert len(made) == copies
    many = some._replace(hidden=torch.zeros(100, 64), weight=torch.zeros(4096, 64))
    run(many)
    assert len(made) == copies + 1


def test_what_a_contender_prepares_is_not_its_memory():
    def make(weight):
        scratch = torch.zeros(1 << 20)
        return lambda x: x + scratch[0]

    held = Contender("held", quantized.layer(make), prepares=True)
    op = Op("", "forward", quantized.plain, lambda d: {"out": d.hidden}, (held,), 2, lambda s, z: 1)
    (row,) = measure(
        Case("linear_nf4", op, Shape(20, 64, 64, 0), torch.float32),
        1,
        Rates({torch.float32: 1e12}, 1e10),
        WallClock(),
        lambda line: None,
    )
    assert row.peak_mb is not None
    assert row.peak_mb < 1


def test_int8_products_are_held_to_the_int8_peak():
    case = Case("linear_nf4", OPS["linear_nf4"], SMALL, torch.bfloat16)
    row, other = (Row("linear_nf4", "", "forward", 8, 128, 96, 0, "bfloat16") for _ in range(2))
    row.ms_median = other.ms_median = 1.0
    by_name = {c.impl: c for c in case.op.contenders}
    rates = Rates({torch.bfloat16: 1e9}, 1e18, int8=2e9)
    fill_roofline(row, case, by_name["int8"], rates)
    assert row.roofline_share == pytest.approx(2 * 8 * 128 * 96 / 2e9 * 1e3)
    fill_roofline(other, case, by_name["fp8"], rates)
    assert other.roofline_share is other.floor_ms is None  # no peak is known, none is made up


def test_the_suites_are_there():
    names = [e.op for e in SUITES["quantized"]]
    assert set(names) == set(quantized.OPS)
    assert {e.shape.N for e in SUITES["quantized"] if e.op == "linear_nf4"} == {1, 16, 256, 512}
    assert len(cases(SUITES["quantized_gpu"], OPS)) == 5


@pytest.mark.slow
def test_a_teacher_with_wrong_answers_is_refused(monkeypatch):
    monkeypatch.setattr(teacher_topk.CONFIG, "vocab_size", 500)
    monkeypatch.setattr(teacher_topk, "ROW", 16)
    contenders = {n: c for n, c in teacher_topk.CONTENDERS.items() if n in ("transformers", "ours")}
    monkeypatch.setattr(teacher_topk, "CONTENDERS", contenders)
    small = Shape(N=32, H=0, V=0, K=0)
    theirs, ours = teacher_topk.rows(small)
    assert theirs.grad_error == 0
    assert ours.grad_error is not None
    assert ours.grad_error < teacher_topk.MOST_MISPLACED
    wrong = contenders | {"ours": lambda model: lambda ids: torch.zeros(ids.numel(), 64).long()}
    monkeypatch.setattr(teacher_topk, "CONTENDERS", wrong)
    with pytest.raises(GateError, match="of our ids are not transformers'"):
        teacher_topk.rows(small)


@pytest.mark.slow
def test_fidelity_of_ours_is_that_of_bitsandbytes(monkeypatch):
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    names = ("bitsandbytes NF4, train", "nf4, exact", "int8, exact")
    some = {name: quant_fidelity.CONTENDERS[name] for name in names}
    monkeypatch.setattr(quant_fidelity, "CONTENDERS", some)
    monkeypatch.setattr(quant_fidelity, "SHAPE", replace(quant_fidelity.SHAPE, N=8))
    theirs, ours, eight = quant_fidelity.rows()
    assert ours.kl == pytest.approx(theirs.kl, rel=0.02)
    assert eight.kl is not None
    assert ours.kl is not None
    assert eight.kl < 0.3 * ours.kl


@pytest.mark.slow
def test_quantization_aware_distillation_lowers_the_kl_on_held_out_text(monkeypatch):
    for name, value in (("SCHEMES", ("nvfp4",)), ("SEEDS", (0,)), ("STEPS", 6), ("BATCH", 4)):
        monkeypatch.setattr(qad, name, value)
    _, rounded, fall = qad.rows(replace(qad.SHAPE, N=32))
    assert rounded.kl is not None
    assert fall.kl_high is not None
    assert 0.001 < rounded.kl < 0.02
    assert fall.kl_high < 0
