"""A quantized embedding and head: the values of the dense matrix, a few rows at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdistill as fd
from fastdistill.quant.matrix import QuantizedMatrix
from fastdistill.quant.schemes import Int8Weight, QuantWeight, quantize
from helpers.present import present

V, H = 131, 64


def packed(kind, dtype=torch.float32):
    weight: QuantWeight = quantize(torch.randn(V, H), kind)
    if kind == "int8":
        q = torch.randint(-127, 128, (V, H), dtype=torch.int8)
        weight = Int8Weight(shape=(V, H), block=32, qdata=q, scale=torch.rand(V * H // 32) / 64)
    return present(QuantizedMatrix.make(weight, dtype))


@pytest.fixture(params=["int8", "int4"])
def matrix(request):
    return packed(request.param)


@pytest.fixture
def never_expanded(monkeypatch):
    def refuse(self):
        raise AssertionError("the whole matrix was expanded")

    monkeypatch.setattr(QuantizedMatrix, "dequantize", refuse)


def test_reads_are_those_of_the_dense_matrix(matrix):
    dense, ids = matrix.dequantize(), torch.tensor([[3, 0], [130, 3]])
    x, bias = torch.randn(2, 3, H), torch.randn(V)
    embedding = nn.Embedding(V, H, _weight=matrix)
    for read in (
        lambda w: w[5:9],
        lambda w: w[-4:],
        lambda w: w[ids],
        lambda w: w.index_select(0, ids[0]),
        lambda w: F.embedding(ids, w, padding_idx=0),
        lambda w: w.to(torch.bfloat16)[:7],
        lambda w: x[0] @ w.t(),
        lambda w: w[:, 3],
        lambda w: w.reshape(-1)[::7],
    ):
        assert torch.equal(read(matrix), read(dense))
    assert torch.equal(embedding(ids), dense[ids])
    torch.testing.assert_close(F.linear(x, matrix, bias), F.linear(x, dense, bias))
    assert matrix.nbytes < dense.nbytes / 2


def test_no_positions_read_no_rows(matrix, monkeypatch):
    """As the head gets them wherever a loss takes its hidden states."""
    monkeypatch.setattr(QuantizedMatrix, "rows", lambda *_: 1 / 0)
    assert F.linear(torch.empty(2, 0, H), matrix).shape == (2, 0, V)


def test_writing_is_refused(matrix):
    for write in (lambda w: w.mul_(2), lambda w: w.__setitem__(0, 1.0), lambda w: w.copy_(w)):
        with pytest.raises(TypeError, match="a tensor that may be written to, got QuantizedMatrix"):
            write(matrix)


def test_a_tied_pair_stays_tied_and_packed(matrix):
    model = nn.ModuleDict({"in": nn.Embedding(1, 1), "out": nn.Linear(1, 1)})
    weight = nn.Parameter(matrix, requires_grad=False)
    model["in"].weight, model["out"].weight = weight, weight
    dense = matrix.dequantize()
    for moved in (copy.deepcopy(model), model.to(torch.bfloat16)):
        first, second = moved["in"].weight, moved["out"].weight
        assert first is second
        assert isinstance(first, QuantizedMatrix)
        assert isinstance(first, nn.Parameter)
        assert torch.equal(first.dequantize(), dense.to(first.dtype))


@pytest.mark.parametrize(
    "kind, dtype, impl",
    [("int8", "float32", "torch"), ("int4", "bfloat16", "torch"), ("int8", "bfloat16", "triton")],
)
def test_a_teachers_losses(kind, dtype, impl, never_expanded):
    dtype = getattr(torch, dtype)
    matrix = packed(kind, dtype)
    dense = matrix.rows(slice(0, V))
    x, student = torch.randn(5, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    y, ids = torch.randn(5, H, dtype=dtype), torch.tensor([[1], [7], [0], [130], [7]])
    for result in (
        lambda w: fd.linear_topk(x, w, 8, impl=impl),
        lambda w: fd.linear_lse_gather(x, w, ids, with_entropy=True, impl=impl).lse,
        lambda w: fd.token_scores(x, w, labels=ids[:, 0], impl=impl).nll,
        lambda w: fd.linear_distill_loss(y, student, x, w, impl=impl),
    ):
        torch.testing.assert_close(result(matrix), result(dense))


def test_gradients_through_its_rows_on_a_gpu_are_refused(matrix):
    x, teacher = torch.randn(5, H), fd.linear_topk(torch.randn(5, H), matrix, 4)
    x.requires_grad_()
    loss = fd.topk_distill_loss(x, matrix, teacher, tail="renorm_both", impl="triton")
    with pytest.raises(TypeError, match="weight: expected a dense head for gradients, got Quant"):
        loss.backward()


@pytest.mark.slow
def test_compiled_layers_read_it(matrix):
    embedding = nn.Embedding(V, H, _weight=matrix).requires_grad_(False)
    ids = torch.tensor([[3, 0], [130, 3]])
    compiled = torch.compile(lambda ids: embedding(ids) * 2, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), embedding(ids) * 2)


@pytest.mark.parametrize("shape", [(6, 33), (6, 96)])
def test_blocks_across_rows_have_no_matrix(shape):
    assert QuantizedMatrix.make(quantize(torch.randn(shape), "nf4"), torch.float32) is None
