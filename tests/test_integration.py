"""The operators inside PyTorch: opcheck, torch.compile, autocast, checkpointing, odd memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastdistill as fd
from benchmarks.memory import peak_mb
from fastdistill.kernels.head import LMHead
from fastdistill.kernels.op_common import BODIES
from fastdistill.kernels.op_dense import dense_rows
from fastdistill.kernels.op_gather import gather_logits, lse_gather
from fastdistill.kernels.op_token_loss import token_loss
from fastdistill.kernels.token_loss import LossOptions, slot_ids
from helpers.cases import case, leaves, top_k
from helpers.present import present
from helpers.tolerances import assert_close

CALLS: dict[str, dict[str, Any]] = {
    "fused": {"labels": True, "ce_weight": 0.2},
    "recompute": {"reduction": "none"},
    "rows": {"tail": "renorm_both"},
    "callable": {"divergence": lambda lp, lq: (lp.exp() * (lp - lq)).sum(-1)},
}


def call(name, x, w, c, t):
    options = dict(CALLS[name])
    if options.pop("labels", False):
        options["labels"] = c.labels.masked_fill(torch.arange(len(c.labels)) % 5 == 1, -100)
    return fd.topk_distill_loss(x, w, t, **options).sum()


def grads(function, *tensors):
    inputs = leaves(*tensors)
    loss = function(*inputs)
    loss.backward()
    return [loss.detach(), *[t.grad for t in inputs]]


def check_compiled(run, c):
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(compiled, *c[:2]), grads(run, *c[:2]), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", list(CALLS))
def test_compile_fullgraph(name):
    c = case(torch.float32)
    t = top_k(c.teacher_logits, 5)

    def run(x, w):
        return call(name, x * 1.5, w, c, t) * 2

    check_compiled(run, c)


@pytest.mark.fast_cases(1)
def test_compile_fullgraph_of_the_others():
    c = case(torch.float32)
    t = top_k(c.teacher_logits, 5)

    def run(x, w):
        out = fd.linear_lse_gather(x, w, t.ids, with_entropy=True)
        dense = fd.linear_distill_loss(x, w, c.hidden, c.weight * 0.9, divergence="jsd")
        return out.logits.sum() + out.lse_rest.sum() + present(out.entropy).sum() + dense

    check_compiled(run, c)


@pytest.mark.fast_cases(1)
def test_opcheck(impl_of_auto):
    c = case(torch.float32, V=70)
    x, w, b = leaves(c.hidden, c.weight, c.bias)
    ids = top_k(c.teacher_logits, 5).ids
    at_2 = LMHead(w, b, valid_vocab=67, temperature=2.0).scalars() | {"impl": impl_of_auto}
    shaped = LMHead(w, None, 0.7, 5.0, 70).scalars() | {"impl": impl_of_auto}
    torch.library.opcheck(lse_gather, (x, w, b, ids), {**at_2, "moment": True, "base": True})
    torch.library.opcheck(lse_gather, (x, w, None, ids), {**shaped, "moment": False, "base": False})
    torch.library.opcheck(gather_logits, (x, w, b, ids), at_2)
    scalars = dense_scalars(LMHead(w, valid_vocab=70), impl_of_auto, ce_weight=0.1)
    teacher = (c.hidden, c.weight, None, c.labels, None)
    torch.library.opcheck(dense_rows, (x, w, b, *teacher), scalars)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_opcheck_of_the_rows(T, impl_of_auto):
    c = case(torch.float32)
    t = top_k(c.teacher_logits, 5)
    ids = slot_ids(t.ids, c.labels)
    scalars = LMHead(c.weight, temperature=T).scalars() | {"impl": "torch"}
    with torch.no_grad():
        stats = lse_gather(c.hidden, c.weight, None, ids, moment=True, base=T != 1, **scalars)
    z, lse_rest, mean_rest, lse_base = stats
    (z, lse_rest), base = leaves(z, lse_rest), leaves(lse_base)[0] if T != 1 else lse_base
    teacher = (t.ids, t.logprobs.float(), present(t.log_tail).float(), c.labels)
    options = LossOptions("jsd", ce_weight=0.1).scalars() | {"temperature": T, "impl": impl_of_auto}
    args = (z, lse_rest, mean_rest, base, ids, *teacher)
    for grad in (False, True):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(token_loss, args, options | {"grad": grad}, test_utils=tests)


def dense_scalars(head, impl, **options):
    options = LossOptions("jsd", **options).scalars() | head.scalars() | {"impl": impl}
    return options | {"teacher_logit_scale": 1.0, "teacher_softcap": None}


@pytest.mark.parametrize("op", ["topk_loss", "dense_loss"])
def test_opcheck_of_gradient_in_forward(op, impl_of_auto):
    """Their backward hands over or scales kept tensors, which opcheck's gradient test covers."""
    c = case(torch.float32)
    x, w, b = leaves(c.hidden, c.weight, c.bias)
    (coef,) = leaves(torch.full((12,), 1 / 12))
    t = top_k(c.teacher_logits, 5)
    need, head = [True] * 3, LMHead(w, valid_vocab=67)
    args: tuple[Any, ...]
    if op == "topk_loss":
        teacher = (t.ids, t.logprobs.float(), present(t.log_tail).float())
        args = (x, w, b, coef, t.ids, *teacher, None)
        scalars = LossOptions().scalars() | head.scalars()
        scalars |= {"base": False, "entropy": True, "impl": impl_of_auto, "filter_eps": None}
    else:
        args = (x, w, b, coef, c.hidden, c.weight * 0.9, None, None, None)
        scalars = dense_scalars(head, impl_of_auto)
    function = getattr(torch.ops.fastdistill, op).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(function, args, scalars | {"need": need}, test_utils=tests)


@pytest.mark.parametrize("name", list(CALLS))
def test_autocast(name):
    """fp32 parameters under bf16 autocast: the operands are cast once, as F.linear casts them."""
    c = case(torch.float32)
    t = top_k(c.teacher_logits, 5)

    def under_autocast(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(name, x, w, c, t)

    def by_hand(x, w):
        return call(name, x.bfloat16(), w.bfloat16(), c, t)

    actual = grads(under_autocast, *c[:2])
    for a, b in zip(actual, grads(by_hand, *c[:2]), strict=True):
        assert_close(a, b, 1e-6)
    assert actual[0].dtype == torch.float32
    assert actual[2].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", list(CALLS))
def test_gradient_checkpointing(name, reentrant):
    c = case(torch.float64)
    t = top_k(c.teacher_logits, 5)

    def plain(x, w):
        return call(name, torch.tanh(x), w, c, t)

    def checkpointed(x, w):
        return checkpoint(plain, x, w, use_reentrant=reentrant)

    for a, b in zip(grads(checkpointed, *c[:2]), grads(plain, *c[:2]), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("name", list(CALLS))
def test_strided_and_non_contiguous(name):
    c = case(torch.float64)
    t = top_k(c.teacher_logits, 5)
    wide_x, wide_w = torch.zeros(12, 3, 16).double(), torch.zeros(16, 67).double()
    wide_x[:, 1], wide_w[:] = c.hidden, c.weight.t()
    strided_t = fd.TopK(
        t.ids.t().contiguous().t(),
        t.logprobs.repeat(1, 2)[:, :5],
        present(t.log_tail).repeat(2)[:12],
    )

    def strided(x, w):
        return call(name, x[:, 1], w.t(), c, strided_t)

    plain = grads(lambda x, w: call(name, x, w, c, t), c.hidden, c.weight)
    loss, dx, dw = grads(strided, wide_x, wide_w)
    assert_close(loss, plain[0], 1e-12)
    assert_close(dx[:, 1], plain[1], 1e-12)
    assert_close(dw.t(), plain[2], 1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_frozen_operand_costs_and_gets_nothing(name, frozen):
    c = case(torch.float64)
    t = top_k(c.teacher_logits, 5)
    x, w = leaves(c.hidden, c.weight)
    (w if frozen == "weight" else x).requires_grad_(False)
    with Largest() as seen:
        call(name, x, w, c, t).backward()
    full = grads(lambda x, w: call(name, x, w, c, t), c.hidden, c.weight)
    assert (w if frozen == "weight" else x).grad is None
    assert_close((x if frozen == "weight" else w).grad, full[1 if frozen == "weight" else 2], 1e-9)
    if frozen == "weight":
        assert (67, 16) not in seen.shapes  # no dW, not even for a moment


class Largest(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        body = BODIES.get(function.name().removeprefix("fastdistill::").split(".")[0])
        if body is None:
            out = function(*args, **kwargs)
        else:  # an operator is opaque to a mode: run its body under it
            with self:
                out = body(*args, **kwargs)
        made = not any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and made:
                self.shapes.add(tuple(tensor.shape))
        return out

    def most(self):
        return max(int(torch.Size(s).numel()) for s in self.shapes)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("name", [*CALLS, "primitive", "dense", "scores", "topk"])
def test_never_n_by_v(name):
    """No operation returns as many numbers as N·V; a dense loss would show up here at once."""
    N, V, H = 96, 4096, 4
    c = case(torch.float32, N=N, V=V, H=H)
    t = top_k(c.teacher_logits, 5)
    x, w = leaves(c.hidden, c.weight)
    with Largest() as seen:
        if name in CALLS:
            call(name, x, w, c, t).backward()
        elif name == "primitive":
            fd.linear_lse_gather(x, w, t.ids).lse.sum().backward()
        elif name == "dense":
            fd.linear_distill_loss(x, w, x.detach(), w.detach() * 0.9).backward()
        elif name == "scores":
            fd.token_scores(x, w, labels=c.labels, teacher=t)
        else:
            fd.linear_topk(x, w, 5)
    assert N * V // 50 < seen.most() < N * V  # it did see slabs
    with Largest() as seen:
        fd.topk_distill_loss(x, w, t, impl="reference").backward()
    assert seen.most() >= N * V


def test_backward_makes_no_second_weight_gradient(impl_of_auto):
    """The kept dW is handed over: autograd's zeros for unused outputs once doubled the peak."""
    if impl_of_auto == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter copies every operand, which is not what is measured")
    N, V, H = 8, 65536, 256
    c = case(torch.float32, N=N, V=V, H=H)
    t = top_k(c.teacher_logits, 5)
    x, w = leaves(c.hidden, c.weight)
    x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
    peak = peak_mb(lambda: fd.topk_distill_loss(x, w, t).backward())
    assert peak < 1.2 * w.numel() * 4 / 1e6


def test_torch_compile_does_not_trace_the_body_of_an_operator():
    """An operator that runs outside a graph is called from C++ while torch.compile is watching."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    head = {"logit_scale": 1.0, "softcap": None, "valid_vocab": 16, "temperature": 1.0}
    ids = torch.zeros(4, 2, dtype=torch.int64)

    @torch._dynamo.disable(recursive=False)
    def outside_a_graph():
        return torch.ops.fastdistill.lse_gather(
            hidden, weight, None, ids, **head, moment=False, base=False, impl="torch"
        )

    torch.compile(lambda: outside_a_graph(), backend=counter)()
    assert counter.frame_count == 0
