"""A peer that is installed at the pinned version is measured; one that cannot be is an error."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import data, peers
from benchmarks.ops import OPS
from benchmarks.packages import installed, pins
from benchmarks.registry import BrokenPeer, Case, Contender, Missing, Op, gate
from benchmarks.roofline import Rates
from benchmarks.rows import table
from benchmarks.run import WallClock, measure
from benchmarks.shapes import Shape
from helpers.pinned import is_as_pinned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
RATES = Rates({torch.float32: 1e12}, 1e10)


def case_of(*contenders: Contender, name: str = "label_loss") -> Case:
    op = Op("", "both", data.labeled, peers.label_loss, contenders, 6, lambda s, size: 1e6)
    return Case(name, op, Shape(8, 32, 500, 1), torch.float32)


INSTALLED = [
    (name, contender.impl)
    for name, op in OPS.items()
    for contender in op.contenders
    if is_as_pinned(contender.package)
]


@pytest.mark.parametrize(("name", "impl"), INSTALLED, ids=" ".join)
def test_an_installed_peer_at_the_pinned_version_is_measured(name, impl):
    op = OPS[name]
    (contender,) = [c for c in op.contenders if c.impl == impl]
    alone = Op(op.about, op.mode, op.make, op.truth, (contender,), op.passes, op.bytes)
    checked = gate(Case(name, alone, Shape(8, 64, 100, 16), torch.bfloat16))
    assert checked.failures == {}
    assert impl in checked.errors


def test_trl_is_among_the_peers_that_are_pinned():
    assert {"trl", "torch"} <= pins().keys()
    trl = {c.impl for op in OPS.values() for c in op.contenders if c.package == "trl"}
    assert trl == {"TRL chunked", "TRL chunked, β=0"}
    names = {impl for _, impl in INSTALLED}
    assert "TRL chunked" in names or installed("trl") is None
    assert {"F.linear_cross_entropy", "aten int4pack", "aten int8pack", "oneDNN qlinear"} <= names


def not_there(d: data.Data):
    return peers.named("torch", "torch.nn.functional", "no_such_loss")(d)


def not_installed(d: data.Data):
    return peers.named("no-such-peer", "no_such_peer", "loss")(d)


def another_signature(d: data.Data):
    return peers.label_loss(d, chunk_size=256)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (not_there, r"BrokenPeer: torch 2\S* is installed and lacks torch.nn.functional.no_such"),
        (another_signature, r"BrokenPeer: torch 2\S* is installed and cannot be called: TypeError"),
    ],
)
def test_an_installed_peer_that_fails_is_named_in_the_output(compute, words):
    broken = Contender("broken", compute, exact=False, package="torch")
    right = Contender("right", peers.label_loss)
    rows = measure(case_of(right, broken), 1, RATES, WallClock(), lambda line: None)
    assert rows[1].missing
    assert re.search(words, rows[1].reason or "")
    assert re.search(words, table(rows))


def test_one_that_is_not_installed_is_missing():
    with pytest.raises(Missing, match="no-such-peer: No module"):
        not_installed(data.labeled(Shape(8, 32, 500, 1), torch.float32))
    with pytest.raises(BrokenPeer, match="lacks"):
        not_there(data.labeled(Shape(8, 32, 500, 1), torch.float32))
