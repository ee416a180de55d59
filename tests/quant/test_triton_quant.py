"""The Triton kernels of quantised weights, bit for bit against a few lines of PyTorch."""

import pytest
import torch

kernels = pytest.importorskip("fastdistill.kernels.triton_quant", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BYTES = [torch.int8, torch.float8_e4m3fn]


def rounded(values, dtype):
    if dtype == torch.int8:
        return values.round().clamp(-127, 127).to(dtype)
    if dtype == torch.float8_e4m3fn:
        return values.clamp(-448, 448).to(dtype)
    return values.to(dtype)


def expanded(parts, block, row_inv=None, cols=None):
    qdata, scale, offset, lut, out = parts
    i = torch.arange(out.numel(), device=out.device)
    byte = qdata[i // 2]
    q = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    w = lut[q.long()] * scale[i // block]
    if offset is not None:
        w = w + offset[i // block]
    if row_inv is not None:
        w = w * row_inv[i // cols]
    return rounded(w, out.dtype)


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
    return torch.equal(actual.view(kind), expected.view(kind))


def blocks(count, block):
    return -(-count // block)


def problem(count, block, dtype, with_offset):
    draw = torch.Generator().manual_seed(count + block)
    tensors = (
        torch.randint(256, (blocks(count, 2),), generator=draw, dtype=torch.uint8),
        3 * torch.rand(blocks(count, block), generator=draw),
        torch.randn(blocks(count, block), generator=draw) if with_offset else None,
        torch.randn(16, generator=draw),
        torch.empty(count, dtype=dtype),
    )
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("block", [1, 7, 32, 48, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_block_size(block, dtype):
    for count in (1, 2, 3 * block, 2051, 4096):
        for with_offset in (False, True):
            args = problem(count, block, dtype, with_offset)
            kernels.lut4_dequant(*args, block)
            assert same_bits(args[-1], expanded(args, block)), (count, with_offset)


@pytest.mark.parametrize("cols", [24, 33, 1024])
@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_eight_bit_results(cols, dtype):
    """Scaled past the end of the range, so that saturation is seen too."""
    count = 3 * cols
    for block in (48, 64, 3):
        args = problem(count, block, dtype, with_offset=block == 48)
        row_inv = torch.tensor([0.01, 30.0, 400.0], device=DEVICE)
        kernels.lut4_dequant(*args, block, row_inv, cols)
        assert same_bits(args[-1], expanded(args, block, row_inv, cols))


def test_eight_bit_results_without_a_factor():
    args = problem(640, 64, torch.int8, with_offset=False)
    kernels.lut4_dequant(*args, 64)
    assert same_bits(args[-1], expanded(args, 64))


def test_a_factor_is_refused_where_it_would_be_lost():
    args = problem(64, 64, torch.bfloat16, with_offset=False)
    with pytest.raises(ValueError, match="row_inv: expected with int8 or fp8 results only"):
        kernels.lut4_dequant(*args, 64, torch.ones(1, device=DEVICE), 64)


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES], ids=str)
@pytest.mark.parametrize("count, block, nested_block", [(2051, 64, 3), (4096, 48, 256), (99, 5, 4)])
def test_nested(dtype, count, block, nested_block):
    qdata, _, offset, lut, out = problem(count, block, dtype, with_offset=True)
    b = torch.arange(blocks(count, block), device=DEVICE)
    absmax = torch.randint(256, b.shape, dtype=torch.uint8, device=DEVICE)
    code = torch.randn(256, device=DEVICE)
    nested = torch.rand(blocks(b.numel(), nested_block), device=DEVICE)
    mean = torch.tensor(0.37, device=DEVICE)
    scale = code[absmax.long()] * nested[b // nested_block] + mean
    for some in (None, offset):
        kernels.lut4_dequant_nested(
            qdata, absmax, code, nested, mean, nested_block, some, lut, out, block
        )
        assert same_bits(out, expanded((qdata, scale, some, lut, out), block))


def test_the_sum_is_not_fused_with_the_product():
    """lut · scale = 1 − 2⁻²⁶ rounds to 1, and 1 − 1 = 0; in an FMA −2⁻²⁶ would be left."""
    lut = torch.full((16,), 1 - 2.0**-13, device=DEVICE)
    scale, offset = torch.tensor([[1 + 2.0**-13], [-1.0]], device=DEVICE)
    out = torch.empty(64, device=DEVICE)
    qdata = torch.zeros(32, dtype=torch.uint8, device=DEVICE)
    kernels.lut4_dequant(qdata, scale, offset, lut, out, 64)
    assert (out == 0).all()


def test_fp8_rounds_as_torch_does():
    """Every fp8 value, every midpoint of two and its neighbours: the arithmetic that stands in for
    the instruction below sm_89 and in the interpreter; on a newer GPU, the instruction."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = every[every.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles, torch.tensor([465.0, 1e30, 1e-12, 3e-39, 2.0**-10])])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (1e38, -1e38))
    x = torch.cat([points, up, down]).to(DEVICE)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    zeros = torch.zeros(blocks(x.numel(), 2), dtype=torch.uint8, device=DEVICE)
    one = torch.ones(16, device=DEVICE)
    kernels.lut4_dequant(zeros, x, None, one, out, 1)
    assert same_bits(out, rounded(x, out.dtype))


def test_what_is_not_a_number_stays_so_or_becomes_zero():
    scale = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    zeros = torch.zeros(2, dtype=torch.uint8, device=DEVICE)
    one = torch.ones(16, device=DEVICE)
    actual = {}
    for dtype in BYTES:
        actual[dtype] = torch.empty(3, dtype=dtype, device=DEVICE)
        kernels.lut4_dequant(zeros, scale, None, one, actual[dtype], 1)
    assert actual[torch.int8].tolist() == [0, 127, -127]
    fp8 = actual[torch.float8_e4m3fn].float()
    assert fp8[0].isnan()
    assert fp8[1:].tolist() == [448, -448]


def quantized(x, dtype):
    top = torch.full((), 127.0 if dtype == torch.int8 else 448.0, device=x.device)
    amax = x.float().abs().amax(1)
    fine = amax.isfinite()
    # Tensor by tensor: top / amax with a Python number is amax.reciprocal() * top, rounded twice.
    inverse = torch.where(fine & (amax > 0), top / amax, 0.0)
    values = torch.where(fine.unsqueeze(1), x.float(), 0.0) * inverse.unsqueeze(1)
    return rounded(values, dtype), torch.where(fine, amax / top, torch.nan)


@pytest.mark.parametrize("cols", [1, 17, 256, 5000])
@pytest.mark.parametrize("to", BYTES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows(dtype, to, cols):
    x = torch.randn(8, cols) * torch.tensor([[1e-3], [1], [50], [1], [1], [1], [1], [1]])
    x[3], x[4, cols // 2], x[5, -1], x[6, 0] = 0, torch.nan, torch.inf, -torch.inf
    x[7, ::3] *= 100
    x = x.to(DEVICE, dtype)
    q, scale = torch.empty_like(x, dtype=to), x.new_empty(8, dtype=torch.float32)
    kernels.quantize_rows(x, q, scale)
    expected_q, expected_scale = quantized(x, to)
    assert torch.equal(q.float(), expected_q.float())
    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
    assert scale.isnan().tolist() == [False] * 4 + [True] * 3 + [False]
    assert (q[3:7].float() == 0).all()


@pytest.mark.parametrize("to", BYTES, ids=str)
def test_rows_too_small_to_have_a_factor_are_zero(to):
    """The largest amax whose top / amax overflows, and the next."""
    top = 127 if to == torch.int8 else 448
    least = torch.tensor(top * 2.0**-128, device=DEVICE)
    more = torch.nextafter(least, torch.ones_like(least))
    x = torch.stack([least, more]).unsqueeze(1) * torch.tensor([1, -1, 0], device=DEVICE)
    q, scale = torch.empty_like(x, dtype=to), x.new_empty(2)
    kernels.quantize_rows(x, q, scale)
    assert q.float().tolist() == [[0, 0, 0], [top, -top, 0]]
    assert torch.equal(scale, torch.stack([torch.zeros_like(more), more / top]))


def test_nothing_to_do():
    empty = torch.empty(0, device=DEVICE)
    kernels.lut4_dequant(empty.byte(), empty, None, torch.ones(16, device=DEVICE), empty, 64)
    q = torch.empty(0, 5, dtype=torch.int8, device=DEVICE)
    kernels.quantize_rows(q.float(), q, empty)
