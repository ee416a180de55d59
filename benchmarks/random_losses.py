"""Random calls of the losses and scores against fp64: python -m benchmarks.random_losses.

Each call is compared with loss_truth.py, which shares no code with the package: no NaN or infinity
where the truth is finite, an error within tests/helpers/tolerances.py's budget or what the
roundings of logits can change, and the same bits when it is repeated. random_inputs.py has the
shapes and options. Groups of calls are functions of (--seed, number of the group), so a run can be
continued with --start, and a failure is repeated by --start GROUP --calls 1. Ctrl+C ends a run with
the record of its calls.

    --impl auto (PyTorch and the C++ kernels), torch, triton (TRITON_INTERPRET=1 without a GPU)
    FASTDISTILL_NO_EXT=1 leaves the C++ kernels out; FASTDISTILL_CPU_ISA chooses theirs
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import fastdistill as fd

from . import loss_truth
from .loss_truth import FACTOR, LARGEST_DELTA, Rows, Student, Truth, Weights
from .random_inputs import BATCH, Group, draw

# (values, gradients) of tests/helpers/tolerances.py; float64 as it rounds.
BUDGET = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-5, 2 * 2**-9),
    torch.float16: (2e-5, 1e-3),
}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-120}  # below it a result is 0
MOST_FAILURES = 50
Results = dict[str, Tensor]


class Expected:
    """The truth of a group: values, bounds, and which calls are compared."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.wide = torch.float64 if group.dtype == torch.float64 else torch.float32
        self.eps = torch.finfo(self.wide).eps / 2
        self.floor = torch.finfo(self.wide).tiny
        self.vocab = group.head["valid_vocab"] or group.weight.shape[1]
        o = group.options
        self.x = group.hidden.double()
        self.w = group.weight[:, : self.vocab].double()
        bias = None if group.bias is None else group.bias[:, : self.vocab].double()
        self.s: Student = loss_truth.student(self.x, self.w, bias, group.head, self.eps)
        self.z = self.s.u / o["temperature"]
        self.e_z = self.s.e_u / o["temperature"] + self.eps * self.z.detach().abs().nan_to_num(
            posinf=0.0, neginf=0.0
        )
        self.ties = torch.zeros(BATCH, dtype=torch.bool)

    def sparse(self, o: dict[str, Any], ids: Tensor | None = None) -> Rows:
        group, tiny = self.group, self.floor
        B, N, V = self.z.shape
        empty = group.ids < 0
        lp = group.logprobs.double().clamp(min=math.log(tiny), max=0.0)
        at = torch.where(empty, V, group.ids)
        zeros = torch.zeros(B, N, V + 1, dtype=torch.float64)
        p = zeros.scatter_add(-1, at, lp.exp().masked_fill(empty, 0.0))[..., :V]
        slots = zeros.scatter(-1, at, 1.0)[..., :V] > 0
        self.teacher_mass = p.sum(-1)
        if group.log_tail is None:
            inside = group.logprobs.double().exp().masked_fill(empty, 0.0).sum(-1)
            log_tail = torch.log1p(-inside.clamp(max=1 - 2.0**-24))
        else:
            log_tail = group.log_tail.double()
        if o["divergence"] == "argmax_ce":
            best = p.masked_fill(~slots, -1.0)
            top = best.topk(min(2, V), -1).values
            if top.shape[-1] > 1:
                self.ties = ((top[..., 0] - top[..., 1]) <= 1e-4 * top[..., 0]).any(-1)
            one = torch.zeros_like(p).scatter(-1, best.argmax(-1, keepdim=True), 1.0)
            slots = slots & (one > 0)
            p = one * slots
            log_tail = torch.where(slots.any(-1), -torch.inf, 0.0).double()
        log_tail = log_tail.clamp(min=math.log(tiny), max=0.0)
        ratio = 1.0
        if o["tail"] == "renorm_both" and group.taken_at != o["temperature"]:
            ratio = group.taken_at / o["temperature"]
            p = p.pow(ratio).clamp(min=tiny) * slots
        delta_p = self.eps * (p.clamp(min=tiny).log().abs() + 4) * max(1.0, ratio)
        if o["tail"].startswith("renorm"):
            mass = torch.where(slots.any(-1), p.sum(-1), 1.0).unsqueeze(-1)
            delta_p = delta_p + (p / mass * delta_p).sum(-1, keepdim=True)
            p = (p / mass).clamp(min=tiny) * slots
        e_tail = self.eps * (log_tail.abs() + 4)
        rows = loss_truth.divergence(
            self.z, self.e_z, p, slots, delta_p, log_tail, e_tail, o, self.eps
        )
        return rows._replace(conditioned=rows.conditioned & ~self._lost(slots, o))

    def _lost(self, slots: Tensor, o: dict[str, Any]) -> Tensor:
        """Positions whose loss is infinite: the student has no mass where the teacher has some."""
        lost = (slots & self.z.isneginf()).any(-1)
        infinite = o["divergence"] in ("forward_kl", "lk_hybrid", "argmax_ce", "jsd")
        infinite |= str(o["divergence"]).startswith("skew")
        lost &= infinite
        labels = self.group.labels
        if labels is not None:
            at = labels.clamp(min=0).unsqueeze(-1)
            lost |= self.z.isneginf().gather(-1, at)[..., 0] & (labels >= 0)
        return lost

    def dense(self, o: dict[str, Any]) -> Rows:
        group = self.group
        scale, cap = (group.teacher_head[f"teacher_{n}"] for n in ("logit_scale", "softcap"))
        teacher = loss_truth.student(
            group.teacher_hidden.double(),
            group.teacher_weight[:, : self.vocab].double(),
            None,
            {"logit_scale": scale, "softcap": cap},
            self.eps,
        )
        T = o["temperature"]
        z = teacher.u.detach() / T
        lp = loss_truth.log_softmax(z, teacher.e_u / T + self.eps * z.abs(), self.eps)
        p = lp.lq.exp().clamp(min=self.floor)
        self.ties = torch.zeros(BATCH, dtype=torch.bool)
        slots = torch.ones_like(p, dtype=torch.bool)
        if o["divergence"] == "argmax_ce":
            if p.shape[-1] > 1:
                top = z.topk(2, -1)
                gap = top.values[..., 0] - top.values[..., 1]
                self.ties = (gap <= 8 * lp.delta.gather(-1, top.indices).sum(-1)).any(-1)
            p = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
            slots = p > 0
        tail = torch.full(z.shape[:2], -700.0).double()
        rows = loss_truth.divergence(
            self.z, self.e_z, p, slots, lp.delta, tail, 0 * tail, o, self.eps
        )
        return rows._replace(
            conditioned=rows.conditioned
            & ((p * lp.delta).sum(-1) < LARGEST_DELTA)
            & ~self._lost(slots & (p > self.floor), o)
        )

    def weights(self) -> Weights:
        group = self.group
        B, N = group.hidden.shape[:2]
        coef = torch.ones(B, N, dtype=torch.float64)
        if group.token_weight is not None:
            coef = group.token_weight.double()
        if group.reduction == "mean":
            used = N if group.labels is None else (group.labels >= 0).sum(-1, keepdim=True)
            coef = coef / (used if isinstance(used, int) else used.clamp(min=1))
        return Weights(coef, upstream_of(group).expand(B, N).double())

    def loss(self) -> Truth:
        o = self.group.options
        rows = self.dense(o) if self.group.kind == "dense" else self.sparse(o)
        truth = loss_truth.loss(
            self.x, self.w, self.s, rows, self.group.labels, self.weights(), o | self.group.head,
            self.eps,
            BUDGET[self.group.dtype],
        )  # fmt: skip
        truth.rows["student_mass"] = (rows.student_mass, torch.full_like(rows.D, torch.inf))
        return truth._replace(conditioned=truth.conditioned & ~self.ties)


def upstream_of(group: Group) -> Tensor:
    """The gradient of the loss [N], alternating in sign for losses per token."""
    N = group.hidden.shape[1]
    signs = torch.ones(N)
    if group.reduction == "none":
        signs[1::2] = -0.5
    return signs * group.upstream


def check_loss(group: Group, impl: str) -> Iterator[tuple[int, str, str | None]]:
    """Run the losses of a group; yields (call, path, what is wrong or None)."""
    expected = Expected(group)
    truth = expected.loss()
    paths = ["fused", "recompute"] if group.reduction != "none" else ["auto"]
    for b in range(BATCH):
        for path in paths:
            results = run_loss(group, b, impl, path)
            yield b, path, compare(group, truth, results, b)
            if path == paths[b % len(paths)]:
                again = run_loss(group, b, impl, path)
                same = all(equal(results[name], again[name]) for name in results)
                yield b, path + ", repeated", None if same else "other bits on repeat"


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def teacher_of(group: Group, b: int) -> fd.TopK:
    tail = None if group.log_tail is None else group.log_tail[b]
    return fd.TopK(group.ids[b], group.logprobs[b], tail, group.taken_at)


def run_loss(group: Group, b: int, impl: str, path: str) -> Results:
    x, w = group.hidden[b].requires_grad_(), group.weight[b].requires_grad_()
    bias = None if group.bias is None else group.bias[b].requires_grad_()
    o = {k: v for k, v in group.options.items() if k != "tail"}
    o |= {
        **group.head,
        "bias": bias,
        "labels": None if group.labels is None else group.labels[b],
        "token_weight": None if group.token_weight is None else group.token_weight[b],
        "reduction": group.reduction,
        "impl": impl,
        "backward": path,
    }
    results: Results = {}
    if group.kind == "dense":
        o |= group.teacher_head
        loss = fd.linear_distill_loss(x, w, group.teacher_hidden[b], group.teacher_weight[b], **o)
    else:
        o |= {"tail": group.options["tail"], "allow_biased": True}
        if b % 2:
            loss = fd.topk_distill_loss(x, w, teacher_of(group, b), **o)
        else:
            out = fd.topk_distill(x, w, teacher_of(group, b), **o)
            loss = out.loss
            named = out._asdict()
            results = {
                n: named[n]
                for n in ("per_token", "divergence", "lse", "nll")
                if named[n] is not None
            }
    results["loss"] = loss.detach()
    leaves = [x, w] if bias is None else [x, w, bias]
    upstream = upstream_of(group).to(loss)
    grads = torch.autograd.grad(
        loss, leaves, upstream if loss.dim() else upstream[0], allow_unused=True
    )
    for name, grad in zip(("hidden", "weight", "bias"), grads, strict=False):
        if grad is not None:
            results[f"grad of {name}"] = grad
    return results


def compare(group: Group, truth: Truth, results: Results, b: int) -> str | None:
    """Return the first thing that is wrong with a call, or None."""
    largest = torch.finfo(torch.float64 if group.dtype == torch.float64 else torch.float32).max / 16
    conditioned = bool(truth.conditioned[b])
    for name, result in results.items():
        if name.startswith("grad of "):
            exact, bound = truth.grads[name[8:]]
            exact, allowed = exact[b], bound[b]
            limit = min(largest, torch.finfo(result.dtype).max / 4)
            exact = torch.nn.functional.pad(
                exact, [0, 0] * (exact.dim() - 1) + [0, len(result) - len(exact)]
            )
            allowed = allowed + SMALLEST.get(result.dtype, 0.0) * result.numel() ** 0.5
        else:
            exact, bound = (t[b] for t in truth.rows[name])
            if name == "loss" and not result.dim():
                exact, bound = exact.sum(), bound.sum()
            allowed, limit = bound.norm(), largest
        result = result.double()
        if not (exact.isfinite().all() and exact.abs().amax() + allowed < limit):
            continue  # the truth, or one with its rounding errors, is beyond the type
        if group.bias is not None and group.bias.isinf().any() and not conditioned:
            continue  # the truth is infinite
        if not result.isfinite().all():
            return f"{name}: not finite where the truth is at most {exact.abs().amax():.3g}"
        error = (result - exact).norm()
        if conditioned and not error <= allowed + 1e-300:
            return f"{name}: error {error:.3g} > {allowed:.3g}, of {exact.norm():.3g}"
    return None


def check_scores(group: Group, impl: str) -> Iterator[tuple[int, str, str | None]]:
    """token_scores and linear_topk against the same truth."""
    expected = Expected(group)
    o = group.options | {"ce_weight": 0.0, "z_loss": 0.0, "tail": "bucket"}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        q = loss_truth.log_softmax(expected.z, expected.e_z, expected.eps)
    conditioned = ((q.lq.exp() * q.delta).sum(-1) < LARGEST_DELTA).all(-1)
    lq, delta, eps = q.lq.detach(), q.delta, expected.eps
    p = lq.exp()
    entropy = -(p * lq).sum(-1)
    moment = (p * (expected.z.detach() - expected.z.detach().amax(-1, keepdim=True)).nan_to_num(
        neginf=0.0
    ).square()).sum(-1)  # fmt: skip
    e_entropy = (p * delta * (1 + lq.abs())).sum(-1) + eps * (
        q.lse.detach().abs() + moment.sqrt() + 2
    )
    deviation = lq + entropy[..., None]
    values["lse"] = (q.lse.detach(), q.e_lse)
    values["entropy"] = (entropy, e_entropy)
    e_var = p * (delta * deviation.square() + 2 * deviation.abs() * (delta + e_entropy[..., None]))
    values["varentropy"] = (
        (p * deviation.square()).sum(-1),
        e_var.sum(-1) + 8 * eps * (moment + 1),
    )
    top = lq.topk(min(2, lq.shape[-1]), -1)
    values["max_logprob"] = (top.values[..., 0], delta.gather(-1, top.indices)[..., 0])
    if top.values.shape[-1] > 1 and top.values.min() > loss_truth.ABSENT / 2:
        margin = top.values[..., 0] - top.values[..., 1]
        values["margin"] = (margin, delta.gather(-1, top.indices).sum(-1))
    if group.kind == "scores":
        teacher = group.taken_at == o["temperature"]
        if teacher:
            for name in ("forward_kl", "hellinger", "tvd"):
                rows = expected.sparse(o | {"divergence": name})
                conditioned = conditioned & rows.conditioned.all(-1)
                least = 0.0 if name == "hellinger" else -math.inf
                values[name] = (rows.D.detach().clamp(min=least), rows.e_D)
        if group.labels is not None:
            at_1 = loss_truth.log_softmax(expected.s.u, expected.s.e_u, eps)
            at = group.labels.clamp(min=0).unsqueeze(-1)
            nll = (at_1.lse - expected.s.u.gather(-1, at)[..., 0]).detach()
            e = at_1.e_lse + expected.s.e_u.gather(-1, at)[..., 0] + eps * nll.abs()
            values["nll"] = (nll.masked_fill(group.labels < 0, 0.0), e)
        run: Callable[..., Results] = run_scores
    else:
        run = run_topk
    for b in range(BATCH):
        results = run(group, b, impl)
        wrong = wrong_values(results, values, b, bool(conditioned[b]), group)
        if wrong is None and group.kind == "linear_topk" and conditioned[b]:
            wrong = wrong_topk(results, lq[b], delta[b], eps)
        yield b, group.kind, wrong
        again = run(group, b, impl)
        same = all(equal(results[name], again[name]) for name in results)
        yield b, group.kind + ", repeated", None if same else "other bits on repeat"


def run_scores(group: Group, b: int, impl: str) -> Results:
    T = group.options["temperature"]
    out = fd.token_scores(
        group.hidden[b],
        group.weight[b],
        labels=None if group.labels is None else group.labels[b],
        teacher=teacher_of(group, b) if group.taken_at == T else None,
        bias=None if group.bias is None else group.bias[b],
        temperature=T,
        impl=impl,
        **group.head,
    )
    results = {name: t for name, t in out._asdict().items() if t is not None}
    if "hellinger" in results:
        results["hellinger"] = results["hellinger"].square()
        results["tvd"] = 1 - results.pop("acceptance_rate")
    return results


def run_topk(group: Group, b: int, impl: str) -> Results:
    out = fd.linear_topk(
        group.hidden[b],
        group.weight[b],
        group.k,
        bias=None if group.bias is None else group.bias[b],
        temperature=group.options["temperature"],
        impl=impl,
        **group.head,
    )
    tail = out.log_tail
    assert tail is not None
    return {"ids": out.ids, "logprobs": out.logprobs, "log_tail": tail}


def wrong_values(
    results: Results,
    values: dict[str, tuple[Tensor, Tensor]],
    b: int,
    conditioned: bool,
    group: Group,
) -> str | None:
    value = BUDGET[group.dtype][0]
    for name, (exact, bound) in values.items():
        if name not in results or not exact[b].isfinite().all():
            continue
        if group.bias is not None and group.bias.isinf().any() and not conditioned:
            continue
        result = results[name].double()
        if not result.isfinite().all():
            return f"{name}: not finite where the truth is at most {exact[b].abs().amax():.3g}"
        error = (result - exact[b]).abs()
        allowed = FACTOR * bound[b] + value * exact[b].abs()
        if conditioned and not (error <= allowed).all():
            at = int((error - allowed).argmax())
            return f"{name}: error {error[at]:.3g} > {allowed[at]:.3g}, of {exact[b][at]:.3g}"
    return None


def wrong_topk(results: Results, lq: Tensor, delta: Tensor, eps: float) -> str | None:
    """The ids are k different ones of the likeliest, with their log-probabilities and the tail."""
    ids, logprobs, log_tail = results["ids"], results["logprobs"].double(), results["log_tail"]
    exact, k = lq.gather(-1, ids), ids.shape[-1]
    if any(len(set(row)) != k for row in ids.tolist()):
        return "ids: repeated"
    present = exact > loss_truth.ABSENT / 2
    allowed = FACTOR * delta.gather(-1, ids) + 2e-5 * exact.abs() * (eps > 1e-10)
    if not ((logprobs - exact).abs() <= allowed)[present].all():
        return f"logprobs: error {(logprobs - exact).abs()[present].amax():.3g}"
    if not (
        exact >= lq.topk(k, -1).values[..., -1:] - FACTOR * 2 * delta.amax(-1, keepdim=True)
    ).all():
        return "ids: not the likeliest"
    rest = lq.scatter(-1, ids, -torch.inf).logsumexp(-1)
    there = rest > loss_truth.ABSENT / 2
    error = (log_tail.double() - rest).abs()[there]
    if not (error <= FACTOR * delta.amax(-1)[there] + 2e-5 * rest.abs()[there]).all():
        return f"log_tail: error {error.amax():.3g}"
    return None


def describe(group: Group) -> dict[str, Any]:
    """The options of a group, for a report of a failure."""
    _, N, H = group.hidden.shape
    shape = {"N": N, "H": H, "V": group.weight.shape[1], "K": group.k}
    o = {k: getattr(v, "__name__", v) for k, v in group.options.items()}
    others = {"taken_at": group.taken_at, "reduction": group.reduction, "upstream": group.upstream}
    optional = ("bias", "labels", "token_weight", "log_tail")
    return {
        "kind": group.kind,
        "dtype": str(group.dtype)[6:],
        **shape,
        **o,
        **group.head,
        **others,
        "with": [name for name in optional if getattr(group, name) is not None],
    }


class Campaign:
    """The counts of a run."""

    def __init__(self, seed: int, impl: str) -> None:
        self.seed, self.impl = seed, impl
        self.calls: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.failed = 0
        self.next_group = 0

    def run(self, start: int, calls: int, say: Callable[[str], None]) -> None:
        """Run groups from `start` until `calls` were made."""
        self.next_group = start
        while self.calls.total() < calls:
            index = self.next_group
            group = draw(self.seed, index)
            check = check_scores if group.kind in ("scores", "linear_topk") else check_loss
            for call, path, wrong in check(group, self.impl):
                self.calls[f"{group.kind} {str(group.dtype)[6:]} {path}"] += 1
                if wrong is not None:
                    self.failed += 1
                    failure = {"seed": self.seed, "group": index, "call": call, "path": path}
                    failure |= {"wrong": wrong, **describe(group)}
                    if len(self.failures) < MOST_FAILURES:
                        self.failures.append(failure)
                        say(json.dumps(failure))
            self.next_group += 1
            if self.next_group % 100 == 0:
                say(f"group {self.next_group}: {self.calls.total()} calls, {self.failed} failures")

    def record(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "impl": self.impl,
            "cpu_isa": fd_isa(),
            "next_group": self.next_group,
            "calls": self.calls.total(),
            "by_kind": dict(sorted(self.calls.items())),
            "failed": self.failed,
            "failures": self.failures,
        }


def fd_isa() -> str:
    """The C++ kernels that take part."""
    from fastdistill.runtime import backend

    extension = backend.extension()
    return "none" if extension is None else extension.isa_names()[backend.cpu_isa()]


def main() -> int:
    cli = argparse.ArgumentParser(
        prog="python -m benchmarks.random_losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_argument("--calls", type=int, default=2000, help="calls of the losses (2000)")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--start", type=int, default=0, help="number of the first group (0)")
    cli.add_argument("--impl", choices=("auto", "torch", "triton", "reference"), default="auto")
    cli.add_argument("--json", action="store_true", help="print one JSON document")
    args = cli.parse_args()
    torch.set_num_threads(1)
    campaign = Campaign(args.seed, args.impl)
    with suppress(KeyboardInterrupt):  # then the record is that of the calls so far
        campaign.run(args.start, args.calls, lambda line: print(line, file=sys.stderr, flush=True))
    record = campaign.record()
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        following = f"next: --start {campaign.next_group}"
        print(f"{record['calls']} calls, {record['failed']} failures; {following}")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
