"""Tile skipping in the fused loss: exact at ε = 0, bounded above it, and slots never skipped."""

import pytest
import torch

import fastdistill as fd
from helpers.cases import case, leaves, top_k
from helpers.tolerances import GRADIENT, assert_close, relative

filtering = pytest.importorskip("fastdistill.kernels.triton_filter", reason="needs triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a case of a few hundred tokens has many of; records what was live."""
    seen = []
    live_tiles = filtering.live_tiles

    def recorded(*args):
        seen.append(live_tiles(*args))
        return seen[-1]

    monkeypatch.setattr(filtering, "live_tiles", recorded)
    if not torch.cuda.is_available():
        tile = {"BM": 16, "BK": 16, "BH": 16, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(filtering, "FILTER_TILE", tile)
    return seen


def run(c, teacher, dtype, impl, **options):
    x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=dtype)
    loss = fd.topk_distill_loss(x, w, teacher, bias=b, impl=impl, **options)
    (loss * 1.7).backward()
    return x.grad, w.grad, b.grad


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "truncate"])
def test_nothing_is_skipped_at_zero(small_tiles, dtype, tail):
    c = case(dtype, N=40, V=203, H=24)
    options = {"tail": tail, "allow_biased": True, "labels": c.labels, "ce_weight": 0.3}
    teacher = top_k(c.teacher_logits, 5)
    actual = run(c, teacher, dtype, "triton", grad_filter_eps=0.0, **options)
    truth = run(c, teacher, torch.float64, "reference", **options)
    assert all(bool(live.all()) for live in small_tiles)
    for a, t in zip(actual, truth, strict=True):
        assert_close(a, t, GRADIENT[dtype])


def test_float16_sums_beyond_its_range(small_tiles):
    """Products of the scaled dz with a massive channel exceed 65504; dW itself does not."""
    c = case(torch.float16, N=16, V=40, H=16)
    c.hidden[:, 0] = 600
    c.weight[:, 0] *= 1e-2
    teacher = top_k(c.teacher_logits, 3)
    actual = run(c, teacher, torch.float16, "triton", grad_filter_eps=0.0)
    truth = run(c, teacher, torch.float64, "reference")
    for a, t in zip(actual, truth, strict=True):
        assert_close(a, t, GRADIENT[torch.float16])


@pytest.mark.slow
def test_peaked_rows_skip_most_tiles_at_little_error(small_tiles):
    c = case(torch.bfloat16, N=40, V=403, H=24, std=25.0, near=1.0)
    teacher = top_k(c.teacher_logits, 5)
    truth = run(c, teacher, torch.float64, "reference")
    actual = run(c, teacher, torch.bfloat16, "triton", grad_filter_eps=2.0**-12)
    share = torch.cat([live.flatten().float() for live in small_tiles]).mean()
    assert share < 0.5
    for a, t in zip(actual, truth, strict=True):
        assert relative(a, t) < 6e-3


@pytest.mark.slow
def test_a_high_bar_leaves_the_slots_alone(small_tiles):
    """With every tile skipped, what is left is exactly the K entries of each token."""
    c = case(torch.bfloat16, N=40, V=203, H=24)
    teacher = top_k(c.teacher_logits, 5)
    dx, dw, db = run(c, teacher, torch.bfloat16, "triton", grad_filter_eps=1e6)
    assert not any(bool(live.any()) for live in small_tiles)
    touched = torch.zeros(203, dtype=torch.bool)
    touched[teacher.ids.unique()] = True
    assert (dw[~touched] == 0).all()
    assert (dw[touched] != 0).any(1).all()
    assert (db[touched] != 0).all()
    z = c.hidden.double() @ c.weight.double().t() + c.bias.double()
    q, p = z.softmax(-1).gather(-1, teacher.ids), teacher.logprobs.exp()
    expected = 1.7 / 40 * ((q - p).unsqueeze(-1) * c.weight.double()[teacher.ids]).sum(1)
    assert_close(dx, expected, GRADIENT[torch.bfloat16])


def test_refusals():
    c = case(torch.bfloat16)
    t = top_k(c.teacher_logits, 5)
    for options, words in (
        ({"impl": "torch"}, "grad_filter_eps: expected None with impl='torch'"),
        ({"impl": "triton", "grad_filter_eps": -1.0}, r"grad_filter_eps: expected a number ≥ 0"),
        ({"impl": "triton", "reduction": "none"}, "grad_filter_eps: expected None unless"),
        ({"impl": "triton", "tail": "renorm_both"}, "grad_filter_eps: expected None unless"),
    ):
        with pytest.raises(ValueError, match=words):
            fd.topk_distill_loss(c.hidden, c.weight, t, **{"grad_filter_eps": 1e-3} | options)
    with pytest.raises(ValueError, match="grad_filter_eps: expected a float16 or bfloat16 head"):
        fd.topk_distill_loss(
            c.hidden.float(), c.weight.float(), t, impl="triton", grad_filter_eps=1e-3
        )
