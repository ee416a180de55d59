"""The CPU kernels of csrc/ on every instruction set of this CPU, against plain torch and fp64."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("fastdistill.runtime._ext") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from fastdistill.runtime import _ext

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODEL = -1  # of AMX's tiles
ISAS = range(_ext.best_isa() + 1)
NAMES = {MODEL: "model of tiles", **dict(enumerate(_ext.isa_names()))}
each_isa = pytest.mark.parametrize("isa", ISAS, ids=NAMES.__getitem__)
each_gemm = pytest.mark.parametrize("isa", [MODEL, *ISAS], ids=NAMES.__getitem__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, any NaN to any other."""
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def nibbles(qdata: Tensor) -> Tensor:
    return torch.stack([qdata >> 4, qdata & 15], -1).flatten(-2).long()


def quantised(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, cols] and scales [rows, groups], fp32."""
    x = x.float().unflatten(-1, (-1, group))
    amax = x.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0).div(amax)  # `127 / amax` would be a reciprocal, rounded twice
    codes = torch.where(amax > 0, torch.round(x * inverse), 0)
    bad = ~amax.isfinite()
    return torch.where(bad, 0, codes).flatten(-2), torch.where(bad, torch.nan, amax / 127)[..., 0]


def exact_gemm(x, codes, scale, offset, bias, agroup):
    """The definition of K3 in torch: codes [N, K], scale and offset [N, groups]; fp32, no FMA."""
    q, sx = quantised(x, agroup)
    repeat = sx.shape[1] // scale.shape[1]
    out = torch.zeros(x.shape[0], codes.shape[0])
    for g in range(sx.shape[1]):
        part = slice(g * agroup, (g + 1) * agroup)
        acc = (q[:, part].long() @ codes[:, part].long().T).float()
        out += acc * (sx[:, g, None] * scale[None, :, g // repeat])
        if offset is not None:
            out += (sx[:, g] * q[:, part].sum(-1))[:, None] * offset[None, :, g // repeat]
    return (out if bias is None else out + bias).to(x.dtype)


def gemm(isa, x, weights, scale, bias, agroup, threads=2, lut4=None):  # lut4: (codes, unit, offset)
    (M, K), N = x.shape, weights.shape[0]
    out = torch.full((M, N), torch.nan, dtype=x.dtype)
    before = isa, threads, at(x), DTYPES[x.dtype], at(weights)
    after = at(bias), at(out), M, N, K, K // scale.shape[1], agroup
    if lut4 is None:
        _ext.int8_gemm(*before, at(scale), *after)
    else:
        _ext.lut4_gemm(*before, at(lut4[0]), lut4[1], at(scale), at(lut4[2]), *after)
    return out


def lut4_weights(N, K, wgroup):
    qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    codes = torch.randint(-128, 128, (16,), dtype=torch.int8)
    return qdata, codes, torch.rand(N, K // wgroup) + 0.01


def test_only_instructions_for_int8_have_a_peak():
    assert _ext.int8_peak(MODEL, 1) == _ext.int8_peak(0, 1) == 0
    has_vnni = _ext.best_isa() >= _ext.isa_names().index("avx512_vnni")
    assert (_ext.int8_peak(_ext.best_isa(), 1) > 0) == has_vnni


def test_an_instruction_set_this_cpu_lacks_is_refused_by_name():
    with pytest.raises(ValueError, match="isa must be an index"):
        _ext.int8_peak(len(_ext.isa_names()), 1)
    for isa in range(_ext.best_isa() + 1, len(_ext.isa_names())):
        with pytest.raises(ValueError, match=_ext.isa_names()[isa]):
            _ext.int8_dequant(isa, 1, 0, 0, 0, 0, 0, 1)


@each_isa
@each_dtype
@pytest.mark.parametrize(("count", "block"), [(1, 1), (31, 7), (4097, 64), (70001, 96), (640, 999)])
def test_dequantised_weights_are_rounded_once(isa, dtype, count, block):
    torch.manual_seed(count)
    qdata = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
    blocks, every = -(-count // block), torch.arange(count) // block
    scale = torch.randn(blocks) * torch.tensor([1e-40, 1.0, 1e4, 1e38])[torch.arange(blocks) % 4]
    scale[blocks // 2] = math.nan if count % 3 else math.inf
    lut, out = torch.randn(16), torch.empty(count, dtype=dtype)
    for offset in (None, torch.randn(blocks)):
        want = lut[nibbles(qdata)[:count]] * scale[every]
        want = (want if offset is None else want + offset[every]).to(dtype)
        sources = at(qdata), at(scale), at(offset), at(lut)
        _ext.lut4_dequant(isa, 2, *sources, at(out), DTYPES[dtype], count, block)
        assert same(out, want)
    bytes_ = torch.randint(-128, 128, (count,), dtype=torch.int8)
    _ext.int8_dequant(isa, 2, at(bytes_), at(scale), at(out), DTYPES[dtype], count, block)
    assert same(out, (bytes_ * scale[every]).to(dtype))


@each_isa
@each_dtype
@pytest.mark.parametrize("group", [1, 24, 64, 130])
def test_activations_are_quantised_as_torch_would(isa, dtype, group):
    torch.manual_seed(group)
    x = torch.randn(7, 5 * group)
    x[:, 3] *= 100
    x[1], x[2, 0], x[3, 1 % group], x[4, -1] = 0, math.nan, math.inf, -math.inf
    x[5, :group] = torch.arange(group) + 0.5  # ties of the rounding
    x = x.to(dtype)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale, sums = torch.empty(7, 5), torch.empty(7, 5, dtype=torch.int32)
    shape = 7, 5 * group, group
    _ext.quantize_groups(isa, 2, at(x), DTYPES[dtype], at(q), at(scale), at(sums), *shape)
    codes, scales = quantised(x, group)
    assert torch.equal(q.float(), codes)
    assert same(scale, scales)
    assert torch.equal(sums, codes.unflatten(-1, (5, group)).sum(-1).int())
    assert scale[1].eq(0).all()
    assert scale[2:5].isnan().sum() == 3


@each_gemm
@pytest.mark.parametrize("M", range(1, 18))
def test_lut4_gemm_is_its_definition(isa, M):
    torch.manual_seed(M)
    N = (1, 31, 33, 64)[M % 4]
    K, wgroup, agroup = ((192, 64, 64), (48, 24, 8), (320, 320, 32))[M % 3]
    x = torch.randn(M, K)
    x[:, 1] *= 100  # an outlier channel
    x = x.to(list(DTYPES)[M % 3])
    qdata, codes, scale = lut4_weights(N, K, wgroup)
    offset = torch.randn_like(scale) if M % 2 else None
    bias = torch.randn(N) if M % 5 else None
    unit = torch.tensor(1 / 127)
    want = exact_gemm(x, codes[nibbles(qdata)], unit * scale, offset, bias, agroup)
    for threads in (1, 2, 3) if M == 13 else (2,):
        lut4 = codes, unit.item(), offset
        assert same(gemm(isa, x, qdata, scale, bias, agroup, threads, lut4), want)


@each_gemm
@pytest.mark.parametrize("M", [1, 15, 29, 35])
def test_int8_gemm_is_its_definition(isa, M):
    torch.manual_seed(M)
    for N, K, wgroup, agroup in [(1, 8, 8, 8), (33, 200, 200, 40), (70, 256, 128, 64)]:
        x = torch.randn(M, K, dtype=torch.bfloat16)
        weights = torch.randint(-128, 128, (N, K), dtype=torch.int8)
        scale, bias = torch.rand(N, K // wgroup), torch.randn(N)
        want = exact_gemm(x, weights, scale, None, bias, agroup)
        assert same(gemm(isa, x, weights, scale, bias, agroup), want)


@each_gemm
def test_a_long_k_in_blocks_keeps_the_order_of_summation(isa):
    # Panels hold 8192 k, or 512 for few rows; a group of weights here is cut by either.
    M, N, K, agroup = (3 if isa == 0 else 70), 40, 3 * 3072, 64
    torch.manual_seed(0)
    x = torch.randn(M, K)
    qdata, codes, scale = lut4_weights(N, K, 3072)
    want = exact_gemm(x, codes[nibbles(qdata)], scale, None, None, agroup)
    assert same(gemm(isa, x, qdata, scale, None, agroup, lut4=(codes, 1.0, None)), want)
    assert same(gemm(isa, x[:1], qdata, scale, None, agroup, lut4=(codes, 1.0, None)), want[:1])


@each_gemm
@pytest.mark.parametrize(("sign", "code"), [(1, 127), (1, -128), (-1, 127), (-1, -128)])
def test_the_integer_core_is_exact_at_its_extremes(isa, sign, code):
    # Scales are powers of two, so an int64 product is the exact result.
    M, N, K = 3, 34, 4096
    x = torch.full((M, K), 127.0 * sign)
    weights = torch.full((N, K), code, dtype=torch.int8)
    want = torch.full((M, N), 0.5 * 127 * sign * code * K)
    assert same(gemm(isa, x, weights, torch.full((N, 1), 0.5), None, K), want)
    codes = torch.full((16,), code, dtype=torch.int8)
    qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    assert same(gemm(isa, x, qdata, torch.ones(N, 1), None, K, lut4=(codes, 0.5, None)), want)


@each_gemm
def test_bad_rows_stay_alone(isa):
    torch.manual_seed(0)
    x = torch.randn(20, 128)
    x[3, 5], x[4, 70], x[5] = math.nan, math.inf, 0
    qdata, codes, scale = lut4_weights(33, 128, 64)
    out = gemm(isa, x, qdata, scale, None, 64, lut4=(codes, 1.0, None))
    assert out[3:5].isnan().all()
    assert out[5].eq(0).all()
    assert not out[[0, 1, 2, *range(6, 20)]].isnan().any()


def lse_topk(isa, z, k, inv_temperature=1.0):
    ids = torch.empty(len(z), k, dtype=torch.int64)
    values, rest = torch.empty(len(z), k), torch.empty(len(z))
    outputs = at(ids), at(values), at(rest)
    rows, columns = z.shape
    _ext.lse_topk(isa, 2, at(z), rows, columns, z.stride(0), inv_temperature, k, *outputs)
    return ids, values, rest


def check_topk(isa, z, k, inv_temperature=1.0):
    ids, values, rest = lse_topk(isa, z, k, inv_temperature)
    # stable: the lower id first
    want, order = torch.sort(z * inv_temperature, dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :k])
    assert torch.equal(values, want[:, :k])
    tail = torch.logsumexp(want[:, k:].double(), -1).float()
    torch.testing.assert_close(rest, tail, rtol=2e-7, atol=1e-6)


@each_isa
@pytest.mark.parametrize(
    ("cols", "k"), [(1, 1), (17, 17), (63, 5), (999, 1), (5003, 64), (4096, 4096), (40000, 300)]
)
def test_topk_and_the_tail(isa, cols, k):
    torch.manual_seed(cols)
    wide = torch.randn(5, cols + 3) * 4
    check_topk(isa, wide[:, 1 : cols + 1], k, 1 / 1.7)
    check_topk(isa, wide.round()[:, :cols], k)  # many ties, and both zeros
    check_topk(isa, wide.sort(-1).values[:, :cols], k)
    check_topk(isa, torch.zeros(2, cols), k)


@each_isa
@pytest.mark.parametrize("drop", [30.0, 80.0, 200.0])
def test_a_faint_tail_keeps_its_digits(isa, drop):
    torch.manual_seed(0)
    z = torch.randn(3, 9000) - drop
    z[:, ::900] = 5.0 + torch.arange(10)
    check_topk(isa, z, 10)


@each_isa
@pytest.mark.parametrize("mask", [-1e30, -math.inf])
def test_masked_and_broken_rows(isa, mask):
    torch.manual_seed(0)
    z = torch.full((3, 5000), mask)
    z[0, 70:90], z[1, 4000:4100] = torch.randn(20), torch.randn(100)
    check_topk(isa, z, 32)
    z[0, 10], z[1, 20], z[2, 30] = math.nan, math.inf, 0.0
    ids, values, rest = lse_topk(isa, z, 3)
    assert rest[0].isnan()
    assert (ids[1, 0], values[1, 0]) == (20, math.inf)
    assert (rest[1].isfinite(), ids[2].tolist()) == (True, [30, 0, 1])
    assert lse_topk(isa, torch.full((1, 100), math.nan), 7)[2].isnan()
