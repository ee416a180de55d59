"""Every public function of tensors on "cuda:1", while the current device is "cuda:0".

Nothing runs: the tensors have no data (`helpers.second_gpu`). What passes makes no tensor on
another device, reads no value on the host and launches each kernel on the tensors' own device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdistill as fd
from fastdistill.hf.row_reader import Rows
from fastdistill.kernels import torch_gather
from fastdistill.kernels.head import LMHead
from fastdistill.losses.answer_checks import AnswerMonitor, AnswerRules
from fastdistill.teachers import local
from helpers.families import build
from helpers.second_gpu import DEVICE, backward, second_gpu, without_data

N, H, V, K = 40, 64, 2003, 6
SHAPED: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.8, "temperature": 1.5}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def head(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias."""
    return [empty(*s, dtype=dtype).requires_grad_() for s in ((N, H), (V, H), (V,))]


def answers(temperature: float = 1.0) -> fd.TopK:
    return fd.TopK(empty(N, K, dtype=torch.int64), empty(N, K), empty(N), temperature)


def of_callable(log_p, log_q):
    return (log_p - log_q).square().sum(-1)


def topk_loss(impl, dtype, **options):
    x, w, b = head(dtype)
    labels = empty(N, dtype=torch.int64)
    if options.pop("weighted", False):
        options |= {"token_weight": empty(N), "num_items": empty(1)}
    teacher = answers(options.get("temperature", 1.0))
    out = fd.topk_distill(x, w, teacher, labels=labels, bias=b, impl=impl, **options)
    assert all(t is None or t.device == DEVICE for t in out)
    return out.loss, (x, w, b)


def dense_loss(impl, dtype, **options):
    x, w, b = head(dtype)
    y, u, _ = head(dtype)
    labels = empty(N, dtype=torch.int64)
    loss = fd.linear_distill_loss(x, w, y, u, labels=labels, bias=b, impl=impl, **options)
    return loss, (x, w, b)


def primitive(impl, dtype, **options):
    x, w, b = head(dtype)
    ids = empty(N, K, dtype=torch.int64)
    out = fd.linear_lse_gather(x, w, ids, bias=b, with_entropy=True, impl=impl, **options)
    assert out.entropy is not None
    return out.logits.sum(-1) + out.lse_rest + out.entropy, (x, w, b)


def scores_and_topk(impl, dtype, **options):
    x, w, b = head(dtype)
    labels, teacher = empty(N, dtype=torch.int64), answers(options.get("temperature", 1.0))
    scores = fd.token_scores(x, w, bias=b, labels=labels, teacher=teacher, impl=impl, **options)
    top = fd.linear_topk(x, w, K, bias=b, impl=impl, **options)
    assert {t.device for t in (*scores, *top[:3]) if t is not None} == {DEVICE}
    return None, ()


COMMON = {"ce_weight": 0.1, "z_loss": 1e-3}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS: list[tuple[str, Any, torch.dtype, dict[str, Any]]] = [
    ("triton", topk_loss, BF16, {"weighted": True}),
    ("triton", topk_loss, FP16, SHAPED | COMMON | {"valid_vocab": 2000}),
    ("triton", topk_loss, BF16, {"grad_filter_eps": 1e-3}),
    ("triton", topk_loss, BF16, {"backward": "recompute"}),
    ("triton", topk_loss, BF16, {"divergence": of_callable}),
    ("triton", topk_loss, FP32, {"tail": "renorm_both"}),
    ("triton", dense_loss, FP16, COMMON),
    ("triton", dense_loss, BF16, {"reduction": "none", "divergence": "jsd"}),
    ("triton", dense_loss, FP32, {"divergence": of_callable}),
    ("triton", primitive, FP32, SHAPED),
    ("triton", scores_and_topk, FP32, SHAPED),
    ("triton", scores_and_topk, BF16, {}),
    ("torch", topk_loss, BF16, SHAPED | COMMON | {"weighted": True}),
    ("torch", topk_loss, FP16, {"reduction": "none", "tail": "truncate", "divergence": "jsd"}),
    ("torch", topk_loss, BF16, {"tail": "renorm_both"}),
    ("torch", dense_loss, BF16, COMMON),
    ("torch", scores_and_topk, FP32, SHAPED),
]


def named(value):
    if isinstance(value, dict):
        return " ".join(value) or "plain"
    return getattr(value, "__name__", None)


@pytest.fixture
def launches():
    with second_gpu() as seen:
        yield seen


@pytest.mark.fast_cases(9)
@pytest.mark.parametrize(("impl", "call", "dtype", "options"), CALLS, ids=named)
def test_a_call_stays_on_its_device(launches, impl, call, dtype, options):
    loss, parameters = call(impl, dtype, **options)
    if loss is not None:
        backward(loss.sum())
    assert all(p.grad is not None and p.grad.device == DEVICE for p in parameters)
    assert bool(launches.kernels) == (impl == "triton")


def test_answers_are_checked_without_a_host_read(launches):
    monitor = AnswerMonitor()
    rows = empty(N, dtype=torch.int64)
    for _ in range(2):
        monitor.check(answers(), rows, rows, AnswerRules(vocab=V, ranked=True))
        monitor.check_hidden(empty(N, H), rows, rows)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantized_layer_stays_on_its_device(quant):
    layers = {}
    for compute in ("exact", "int8", "fp8"):
        linear = nn.Sequential(nn.Linear(64, 32, dtype=BF16))
        # fp8 is refused for a layer on a CPU, where it is quantized here.
        made: Any = fd.quantize_model(
            linear, quant, compute="int8" if compute == "fp8" else compute
        )
        made[0].compute = compute
        layers[compute] = made
    with second_gpu() as launches, torch.no_grad():
        for layer in layers.values():
            assert without_data(layer)(empty(5, 64, dtype=BF16)).device == DEVICE
    assert "quantize_row" in launches.kernels


def test_a_teacher_answers_on_its_device():
    """Only reading the rows waits for the GPU, once in a batch."""
    teacher = fd.Teacher(build("llama"))
    with second_gpu(strict=False), pytest.MonkeyPatch.context() as patch:
        without_data(teacher.model)
        ids, at = empty(3, 8, dtype=torch.int64), empty(19, dtype=torch.int64)
        patch.setattr(local, "read_rows", lambda *batch: Rows(at, at, [8, 8, 3], (3, 8)))
        assert {t.device for t in teacher.topk(ids, k=5)[:3] if t is not None} == {DEVICE}
        assert teacher.hidden(ids).device == DEVICE


def test_what_leaves_the_device_is_an_error(launches):
    with pytest.raises(AssertionError, match="made a tensor on cuda:0"):
        torch.zeros(3, device="cuda:0")
    with pytest.raises(AssertionError, match="made a tensor on cpu"):
        empty(3).cpu()
    with pytest.raises(Exception, match="_local_scalar_dense"):
        empty(3).sum().item()


def test_rows_of_w_are_summed_alike_on_a_gpu():
    """renorm_both in PyTorch waited for a GPU to learn how many ids are distinct."""
    weight = torch.randn(30, 8)
    x, g, b = torch.randn(50, 8), torch.randn(50, 4), torch.randn(30)
    ids = torch.randint(-1, 30, (50, 4))
    lm_head, g = LMHead(weight, b), g.masked_fill(ids < 0, 0.0)
    z = torch_gather.forward(lm_head, x, ids)
    need: dict[str, Any] = {"need_weight": True, "need_bias": True}
    _, *expected = torch_gather.backward(lm_head, x, ids, z, g, need_hidden=False, **need)
    actual = torch_gather.without_host_reads(lm_head, x, ids, g, **need)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
