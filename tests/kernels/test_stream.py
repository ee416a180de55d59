"""The all-Triton streaming pass, on small tiles: the dense statistics, whatever the splits."""

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels import gpu_slabs
from helpers.cases import case, top_k
from helpers.present import present
from helpers.tolerances import assert_close

stream = pytest.importorskip("fastdistill.kernels.triton_stream", reason="needs triton")


@pytest.fixture
def streamed(monkeypatch):
    """Every 16-bit head streams, in tiles small enough for the interpreter; counts the launches."""
    launches = []
    launch = stream.launch

    def counted(*args, **options):
        launches.append(args[1])
        launch(*args, **options)

    monkeypatch.setattr(stream, "launch", counted)
    monkeypatch.setattr(gpu_slabs, "STREAM_UP_TO", dict.fromkeys([9, 10, "interpreted"], 10**6))
    if not torch.cuda.is_available():
        small = {"BN": 16, "BV": 32, "BH": 16, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(stream, "LIGHT", small)
        monkeypatch.setattr(stream, "HEAVY", small | {"BV": 64})
    return launches


def traps(N: int, S: int, V: int) -> torch.Tensor:
    """Repeats, empty slots, a row of them, runs of neighbours at both ends of the vocabulary."""
    ids = torch.randint(V, (N, S), generator=torch.Generator().manual_seed(3))
    ids[:, 2] = ids[:, 0]
    ids[1, 1] = -1
    ids[4] = -1
    ids[5], ids[6] = torch.arange(S), torch.arange(V - S, V)
    return ids


HEADS = [
    {},
    {"temperature": 2.5, "softcap": 3.0, "logit_scale": 0.7},
    {"logit_scale": -1.0},
    {"valid_vocab": 197},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_primitive_against_dense_fp64(streamed, dtype, head):
    c = case(dtype, V=211, N=20, H=40)
    ids = traps(20, 6, 197)
    options = {"with_entropy": True} | head
    actual = fd.linear_lse_gather(c.hidden, c.weight, ids, bias=c.bias, impl="triton", **options)
    wide = (t.double() for t in c[:3])
    x, w, b = wide
    truth = fd.linear_lse_gather(x, w, ids, bias=b, impl="reference", **options)
    assert streamed
    for name, *pair in zip(actual._fields, actual, truth, strict=True):
        a, t = map(present, pair)
        assert (a.isinf() == t.isinf()).all(), name
        assert_close(a.masked_fill(a.isinf(), 0), t.masked_fill(t.isinf(), 0), 2e-5, name)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scores_against_dense_fp64(streamed, temperature):
    c = case(torch.bfloat16, V=211, N=20, H=40)
    teacher = top_k(c.teacher_logits, 5, temperature)
    options = {"labels": c.labels, "teacher": teacher, "temperature": temperature}
    actual = fd.token_scores(c.hidden, c.weight, impl="triton", **options)
    truth = fd.token_scores(c.hidden.double(), c.weight.double(), impl="reference", **options)
    assert streamed
    for name, *pair in zip(actual._fields, actual, truth, strict=True):
        a, t = map(present, pair)
        if t.is_floating_point():
            assert_close(a, t, 2e-4, name)
        else:
            assert (a == t).all(), name


def test_splits_change_nothing_but_rounding(streamed, monkeypatch):
    c = case(torch.bfloat16, V=211, N=20, H=40)
    ids = traps(20, 6, 211)
    results = []
    for count in (1, 3, 7):
        monkeypatch.setattr(stream, "splits", lambda *args, count=count: count)
        results.append(fd.linear_lse_gather(c.hidden, c.weight, ids, impl="triton"))
    assert [grid[1] for grid in streamed] == [1, 3, 7]
    for other in results[1:]:
        assert torch.equal(other.logits, results[0].logits)
        assert_close(other.lse_rest, results[0].lse_rest, 1e-6)


def test_the_same_run_gives_the_same_bits(streamed):
    c = case(torch.bfloat16, V=211, N=20, H=40)
    ids = traps(20, 6, 211)
    a, b = (fd.linear_lse_gather(c.hidden, c.weight, ids, impl="triton") for _ in range(2))
    assert len(streamed) == 2
    assert torch.equal(a.lse_rest, b.lse_rest)


def test_what_it_cannot_address_goes_through_slabs(streamed):
    """The copy engine wants rows of whole 16 bytes, and the matrix units 16-bit operands."""
    for dtype, H in ((torch.bfloat16, 35), (torch.float32, 40)):
        c = case(dtype, V=211, N=20, H=H)
        fd.linear_lse_gather(c.hidden, c.weight, traps(20, 6, 211), impl="triton")
    assert not streamed
