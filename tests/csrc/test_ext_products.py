"""Products of bfloat16 and sweeps over columns in csrc/, on each instruction set, against fp64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("fastdistill.runtime._ext") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

import fastdistill as fd
from fastdistill.kernels import cpu_kernels
from fastdistill.losses import cpu_kernels as compiled
from fastdistill.runtime import _ext, backend
from helpers.present import present
from helpers.tolerances import GRADIENT, PROMISED, relative

MODEL = -1  # of AMX's tiles
T = 1.5
ISAS = range(_ext.best_isa() + 1)
PRODUCTS = [isa for isa in (MODEL, *ISAS) if _ext.has_bf16_gemm(isa)]
NAMES = {MODEL: "model of tiles", **dict(enumerate(_ext.isa_names()))}
each_product = pytest.mark.parametrize("isa", PRODUCTS, ids=NAMES.__getitem__)
each_isa = pytest.mark.parametrize("isa", ISAS, ids=NAMES.__getitem__)


@pytest.fixture
def use(monkeypatch):
    """Choose an instruction set and a number of threads."""

    def chosen(isa: int, threads: int = 1) -> None:
        monkeypatch.setattr(backend, "cpu_isa", lambda: isa)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return chosen


def operands(m: int, n: int, k: int, dtype: torch.dtype, *, by_columns: bool):
    torch.manual_seed(m + n + k)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).bfloat16()
    return (a.t().contiguous().t(), b) if by_columns else (a, b.t().contiguous().t())


@each_product
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("size", [(1, 1, 1), (14, 32, 64), (33, 70, 65), (17, 33, 1030)], ids=str)
def test_a_product_sums_in_fp32(use, isa, size, by_columns):
    for dtype in (torch.bfloat16, torch.float32):
        m, n, k = size
        a, b = operands(m, n, k, dtype, by_columns=by_columns)
        start = torch.randn(m, n + 3)[:, :n]
        exact = start.double() + a.bfloat16().double() @ b.double()
        outs = []
        for threads in (1, 3):
            use(isa, threads)
            outs.append(start.clone())
            compiled.ProductOnCPU()(a, b, outs[-1], add=True)
        assert torch.equal(outs[0], outs[1])
        assert relative(outs[0], exact) < 1e-6
        written = torch.full_like(start, torch.nan)
        compiled.ProductOnCPU()(a, b, written)
        assert relative(written, exact - start.double()) < 1e-6
        rounded = start.bfloat16()
        compiled.ProductOnCPU()(a, b, rounded, add=True)
        assert relative(rounded, exact) < 3e-3
        compiled.ProductOnCPU()(a, b, outs[0], add=True, remainder=True)
        assert relative(outs[0], start.double() + a.double() @ b.double()) < 1e-5


@pytest.mark.skipif(not PRODUCTS[2:], reason="this CPU has no instructions for bfloat16")
def test_instructions_give_the_bits_of_the_portable_product(use):
    a, b = operands(29, 47, 1500, torch.float32, by_columns=False)
    a[0], a[1, ::2], b[2] = 1e-39, torch.inf, torch.nan  # a subnormal counts as zero
    a[3] *= 1e-30
    outs = []
    for isa in (PRODUCTS[1], PRODUCTS[2]):
        use(isa)
        outs.append(torch.zeros(29, 47))
        compiled.ProductOnCPU()(a, b, outs[-1])
    assert torch.allclose(outs[0], outs[1], rtol=0, atol=0, equal_nan=True)
    assert (outs[0][0].nan_to_num() == 0).all()


def test_the_order_of_a_sum(use):
    """vdpbf16ps adds the product of the odd k first; tiles sum even and odd k of 32 apart."""
    big = 2.0**27
    b = torch.ones(64, 1).bfloat16()
    odd_first = torch.zeros(1, 64)
    odd_first[0, :4] = torch.tensor([1.0, -big, big, 0.0])
    apart = torch.zeros(1, 64)
    apart[0, :4] = torch.tensor([1.0, big, 1.0, -big])
    for isa, row, expected in (
        (PRODUCTS[1], odd_first, 0.0),  # −big, then 1 is lost, then big
        (PRODUCTS[1], apart, 1.0),  # big, then 1 is lost, then −big, then 1
        (MODEL, apart, 2.0),
    ):
        use(isa)
        out = torch.zeros(1, 1)
        compiled.ProductOnCPU()(row.bfloat16(), b, out)
        assert out.item() == expected


def test_a_product_of_nothing(use):
    use(PRODUCTS[0])
    out = torch.ones(3, 4)
    compiled.ProductOnCPU()(
        torch.empty(3, 0).bfloat16(), torch.empty(0, 4).bfloat16(), out, add=True
    )
    assert (out == 1).all()
    compiled.ProductOnCPU()(torch.empty(3, 0).bfloat16(), torch.empty(0, 4).bfloat16(), out)
    assert (out == 0).all()
    compiled.ProductOnCPU()(torch.empty(0, 5).bfloat16(), torch.empty(5, 4).bfloat16(), out[:0])


def wrong_products():
    """Operands of fastdistill::bf16_product with one that is wrong, by the name of that one."""
    a, b = torch.ones(4, 6).bfloat16(), torch.ones(6, 5).bfloat16()
    right = {"a": a, "b": b, "out": torch.zeros(4, 5), "scratch": torch.empty(1 << 16).byte()}
    for name, value in (
        ("a", a[0]),
        ("a", a.double()),
        ("a", torch.ones(4, 12, 2).bfloat16()[:, ::2, 0]),
        ("b", b[:3]),
        ("b", b.float()),
        ("out", torch.zeros(4, 4)),
        ("out", torch.zeros(5, 4).t()),
        ("out", torch.zeros(4, 5).half()),
        ("scratch", torch.empty(16).byte()),
        ("scratch", torch.empty(1 << 16)),
    ):
        yield name, right | {name: value}


@pytest.mark.parametrize(("name", "operands"), list(wrong_products()), ids=lambda v: str(v)[:8])
def test_a_product_of_other_shapes_and_types_is_refused(name, operands, use):
    use(MODEL)
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        torch.ops.fastdistill.bf16_product(*operands.values(), False, False)


def test_columns_of_another_length_are_refused():
    u, n = torch.randn(8, 5), torch.zeros(5)
    for wrong in (torch.zeros(4), torch.zeros(5).double(), torch.zeros(1, 5), torch.zeros(10)[::2]):
        with pytest.raises(ValueError, match=r"^top: expected"):
            compiled.sum_columns(u, wrong, temperature=1.0, moments=0)
        with pytest.raises(ValueError, match=r"^sums: expected"):
            compiled.sum_remainders(u, wrong)
    for short in (torch.zeros(4), torch.zeros(5).half()):
        for operands in ((short, n), (n, short)):
            with pytest.raises(ValueError, match=r"^(lse|factor): expected"):
                compiled.softmax_columns(u, *operands, temperature=1.0, softcap=None)
    for bad, k in ((u[0], 1), (u, 0), (u, 6)):
        with pytest.raises(ValueError, match=r"^[zk]: expected"):
            torch.ops.fastdistill.row_topk(bad, k)
    for bad in (u.double(), u.t(), u[0]):
        with pytest.raises(ValueError, match=r"^u: expected"):
            compiled.sum_columns(bad, n[: bad.shape[-1]], temperature=1.0, moments=0)


def test_a_bad_call_is_refused():
    size = (1, 1, 1)
    with pytest.raises(ValueError, match="fp32 \\(0\\) or bf16 \\(1\\)"):
        _ext.bf16_gemm(MODEL, 1, 0, 2, 1, 1, 0, 1, 1, 0, 0, 1, *size, False, False, 0)
    with pytest.raises(ValueError, match="a stride of 1"):
        _ext.bf16_gemm(MODEL, 1, 0, 1, 2, 2, 0, 1, 1, 0, 0, 1, *size, False, False, 0)
    with pytest.raises(ValueError, match="out_stride >= N"):
        _ext.bf16_gemm(MODEL, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, *size, False, False, 0)
    without = [isa for isa in ISAS if not _ext.has_bf16_gemm(isa)]
    for isa in without[:1]:
        with pytest.raises(ValueError, match="has_bf16_gemm"):
            _ext.bf16_scratch(isa, 1, 1, 1)


@each_isa
@pytest.mark.parametrize("shape", [(1, 1), (200, 67), (65, 16)], ids=str)
def test_sums_of_columns(use, isa, shape):
    torch.manual_seed(0)
    wide = 8 * torch.randn(shape[0], shape[1] + 5)
    u, top, T = wide[:, : shape[1]], torch.full((shape[1],), 7.0), 1.7
    u[0] = -1e30  # an absent logit
    use(isa)
    most, sums = compiled.sum_columns(u, top, temperature=T, moments=2)
    z = u.double() / T
    assert relative(most, torch.maximum(top.double(), z.amax(0))) < 1e-6
    d = (z - most.double()).clamp(min=-1e4)
    for i in range(3):
        assert relative(sums[i], (d.exp() * d**i).sum(0)) < 4e-6
    assert (top == 7).all()
    u[shape[0] // 2, 0] = torch.nan
    _, sums = compiled.sum_columns(u, top, temperature=T, moments=1)
    assert all(s[0].isnan() and not s[1:].isnan().any() for s in sums)


@each_isa
def test_softmax_of_columns(use, isa):
    torch.manual_seed(0)
    u, T = 20 * torch.randn(99, 37), 2.0
    lse, factor = (u.double() / T).logsumexp(0), torch.randn(37)
    exact = (u.double() / T - lse).exp() * factor.double()
    use(isa)
    for softcap in (None, 90.0):
        out = u.clone()
        compiled.softmax_columns(out, lse.float(), factor, temperature=T, softcap=softcap)
        assert relative(out, exact if softcap is None else exact * (1 - (u / 90.0) ** 2)) < 3e-6


@each_isa
def test_sums_of_what_rounding_takes_away(use, isa):
    torch.manual_seed(0)
    u, sums = torch.randn(70, 37), torch.ones(37)
    use(isa)
    compiled.sum_remainders(u, sums)
    assert relative(sums - 1, (u.double() - u.bfloat16().double()).sum(0)) < 1e-4


@pytest.mark.skipif(not PRODUCTS[2:], reason="this CPU has no instructions for bfloat16")
@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_a_direction_that_all_rows_share(backward):
    """It cancels in dX, since the gradients of a softmax sum to 0; rounding errors must, too."""
    torch.manual_seed(0)
    N, H, V, K = 40, 32, 3000, 8
    hidden = torch.randn(N, H).bfloat16()
    weight = (0.02 * torch.randn(V, H) + torch.randn(H)).bfloat16()
    logits = hidden.float() @ weight.float().t() + torch.randn(N, V)
    values, ids = (logits / T).log_softmax(-1).topk(K)
    teacher = fd.TopK(ids, values, torch.log1p(-values.exp().sum(-1)), T)
    got = gradients(hidden, weight, teacher, backward=backward)
    exact = gradients(hidden.double(), weight.double(), teacher, backward=backward)
    assert relative(got[1], exact[1]) < PROMISED[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_a_loss_with_and_without_the_kernels(monkeypatch, dtype, backward):
    """Both equal fp64 within the budget of the gradient, and each other much closer in the loss."""
    torch.manual_seed(0)
    N, H, V, K = 70, 48, 700, 8
    base = torch.randn(N, H)
    hidden, weight = (base + base.mean(0)).to(dtype), (0.3 * torch.randn(V, H) + 0.1).to(dtype)
    logits = hidden.float() @ weight.float().t() + torch.randn(N, V)
    values, ids = (logits / T).log_softmax(-1).topk(K)
    teacher = fd.TopK(ids, values, torch.log1p(-values.exp().sum(-1)), T)
    results: list[list[Tensor]] = []
    for available in (compiled.available, lambda: None):
        monkeypatch.setattr(cpu_kernels, "_available", available)
        results.append(gradients(hidden, weight, teacher, backward=backward))
    exact = gradients(hidden.double(), weight.double(), teacher, backward=backward)
    for result in results:
        assert abs(result[0] - exact[0]) < 1e-5
        for got, wanted in zip(result[1:], exact[1:], strict=True):
            assert relative(got, wanted) < GRADIENT[dtype]


def test_a_loss_does_not_use_the_emulated_product(use):
    for isa in ISAS:
        use(isa)
        uses = present(compiled.available()).new_product is not None
        assert uses == (NAMES[isa] in ("avx512_bf16", "amx_bf16"))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_one_graph_of_the_k_best_tokens():
    """`linear_topk` is no operator: torch.compile traces it, and cannot call the kernels."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(fd.linear_topk, fullgraph=True, backend="eager")
    traced, eager = compiled(hidden, weight, 5), fd.linear_topk(hidden, weight, 5)
    assert torch.equal(traced.ids, eager.ids)
    assert torch.allclose(traced.logprobs, eager.logprobs, atol=1e-5)


def gradients(hidden: Tensor, weight: Tensor, teacher: fd.TopK, *, backward: str) -> list[Tensor]:
    x, w = (t.clone().requires_grad_() for t in (hidden, weight))
    loss = fd.topk_distill_loss(x, w, teacher, temperature=T, backward=backward)
    (3 * loss).backward()
    return [loss.detach(), present(x.grad), present(w.grad)]
