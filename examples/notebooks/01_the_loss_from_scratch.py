# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The loss from scratch
#
# A student learns from a teacher's top K tokens. We write this loss in a few lines of PyTorch,
# replace it with `topk_distill_loss`, and compare both in error and in memory.
# It runs on a CPU in about a minute.

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.profiler import ProfilerActivity, profile

import fastdistill as fd

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--tokens", type=int, default=512, help="N, the largest batch")
parser.add_argument("--vocab", type=int, default=32000, help="V")
args = parser.parse_known_args()[0]  # a notebook has other arguments
args.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The setting
#
# The loss reads the last hidden states of the student, $x \in \mathbb{R}^{N \times H}$, and the
# weight of its LM head, $W \in \mathbb{R}^{V \times H}$. The teacher has the same form; of its
# distribution $p$ we keep the $K$ likeliest tokens $S$, their log-probabilities, and the logarithm
# of the rest of the mass, the tail. `linear_topk` computes these without the $N \times V$ logits.

# %%
N, H, V, K = args.tokens, 256, args.vocab, 64
torch.manual_seed(0)
hidden = torch.randn(N, H)
weight = torch.randn(V, H) * 3 / H**0.5  # logits of width 3
teacher_hidden = hidden + 0.3 * torch.randn(N, H)
teacher = fd.linear_topk(teacher_hidden, weight, k=K)
mass = teacher.logprobs.exp().sum(-1)
print(f"the top {K} of {V:,} tokens have {mass.mean():.0%} of the teacher's mass")

# %% [markdown]
# ## Eager PyTorch
#
# The tail is one more outcome, the bucket. With $q = \mathrm{softmax}(x W^\top)$,
#
# $$\ell = \sum_{v \in S} p_v \log \frac{p_v}{q_v}
#        + p_{\text{rest}} \log \frac{p_{\text{rest}}}{q_{\text{rest}}},
#   \qquad q_{\text{rest}} = \sum_{v \notin S} q_v .$$


# %%
def eager_loss(hidden, weight, teacher):
    """Return the mean loss, from materialized logits."""
    log_q = torch.log_softmax(hidden @ weight.T, dim=-1)
    log_q_top = log_q.gather(-1, teacher.ids)
    rest = log_q.scatter(-1, teacher.ids, -torch.inf)
    log_q_rest = torch.logsumexp(rest, dim=-1)
    p, log_p_rest = teacher.logprobs.exp(), teacher.log_tail
    kl = (p * (teacher.logprobs - log_q_top)).sum(-1)
    return (kl + log_p_rest.exp() * (log_p_rest - log_q_rest)).mean()


def gradients(loss, hidden, weight, teacher):
    """Return the loss, and its gradients with respect to hidden states and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(hidden, weight, teacher)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


eager, *_ = gradients(eager_loss, hidden, weight, teacher)
print(f"eager: {eager:.6f} nats per token")

# %% [markdown]
# ## One call
#
# The same loss without logits: they exist for one chunk of tokens at a time, and the chunk is
# overwritten with its gradient.

# %%
fused, *_ = gradients(fd.topk_distill_loss, hidden, weight, teacher)
print(f"fused: {fused:.6f} nats per token")


# %% [markdown]
# `backward="recompute"` keeps less: it computes the logits again in the backward pass.


# %%
def recompute_loss(hidden, weight, teacher):
    return fd.topk_distill_loss(hidden, weight, teacher, backward="recompute")


losses = {"eager": eager_loss, "fused": fd.topk_distill_loss, "recompute": recompute_loss}

# %% [markdown]
# ## Error
#
# The truth is the eager loss in fp64. The operands are first rounded to the type under test, so
# that only the arithmetic differs. The error of a gradient is $\|g - g_{64}\| / \|g_{64}\|$.

# %%
errors = {}
for dtype in (torch.float32, torch.bfloat16):
    operands = hidden.to(dtype), weight.to(dtype)
    exact_teacher = teacher._replace(
        logprobs=teacher.logprobs.double(), log_tail=teacher.log_tail.double()
    )
    exact = gradients(eager_loss, *(x.double() for x in operands), exact_teacher)
    for name, loss in losses.items():
        result = gradients(loss, *operands, teacher)
        errors[name, dtype] = max(
            ((g.double() - e).norm() / e.norm()).item()
            for g, e in zip(result[1:], exact[1:], strict=True)
        )
        print(f"{name:>9}, {dtype!s:>14}: gradient error {errors[name, dtype]:.1e}")

# %% [markdown]
# With bf16 operands, eager PyTorch rounds the logits to bf16. The fused loss computes them in fp32.
#
# ## Memory
#
# PyTorch's profiler records every allocation. The peak includes the gradients, which every loss
# returns.


# %%
def peak_megabytes(loss, *operands):
    """Return the largest sum of live allocations during a call with gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        gradients(loss, *operands)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6


sizes = [N // 8, N // 4, N // 2, N]
peaks = {
    name: [peak_megabytes(loss, hidden[:n], weight, teacher.at(slice(n))) for n in sizes]
    for name, loss in losses.items()
}
for name, values in peaks.items():
    print(f"{name:>9}: " + ", ".join(f"{v:.0f}" for v in values) + f" MB at N = {sizes}")

# %% [markdown]
# ## The picture
#
# Both panels compare the three losses on this machine.

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
colors = {"eager": "#d55e00", "fused": "#0072b2", "recompute": "#009e73"}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, values in peaks.items():
    left.plot(sizes, values, "o-", color=colors[name], label=name)
gradients_mb = 4 * V * H / 1e6
left.axhline(gradients_mb, color="gray", ls="--", lw=1, label="gradient of the head alone")
left.set(xlabel="N, tokens", ylabel="MB", title=f"Peak memory, V = {V:,}", ylim=0)
left.legend(frameon=False)
for i, (name, color) in enumerate(colors.items()):
    heights = [errors[name, dtype] for dtype in (torch.float32, torch.bfloat16)]
    at = [x + 0.28 * (i - 1) for x in range(2)]
    bars = right.bar(at, heights, width=0.27, color=color, label=name)
    right.bar_label(bars, fmt="%.0e", padding=2, fontsize=8)
right.set_xticks(range(2), ["fp32 operands", "bf16 operands"])
right.set(yscale="log", ylim=(3e-7, 0.2), title="Relative gradient error against fp64")
right.legend(frameon=False, loc="upper left")
figure.savefig(args.out / "01_the_loss_from_scratch.svg")
