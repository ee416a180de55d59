"""Replace the loss of a training loop: hidden states and LM head in, no logits.

python examples/101_loss.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus, models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=120)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

teacher, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
rows = corpus.packed_windows(
    corpus.standard_library().train, tokenizer, length=64, max_windows=2000
).ids
student = models.new_llama(models.STUDENT, vocab_size=len(tokenizer), seed=0)


def eager_loss(hidden, weight, answers):
    """Return the same loss from logits: KL over the k tokens and one bucket for the rest."""
    log_q = torch.log_softmax(hidden @ weight.T, -1).gather(-1, answers.ids)
    log_q_rest = torch.log1p(-log_q.exp().sum(-1))
    kl = (answers.logprobs.exp() * (answers.logprobs - log_q)).sum(-1)
    return (kl + answers.log_tail.exp() * (answers.log_tail - log_q_rest)).mean()


prompt = "def check(value):\n    if value is"
prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
next_token = teacher.topk(prompt_ids, k=8).at((0, -1))


def student_probabilities():
    with torch.no_grad():
        return student(prompt_ids).logits[0, -1].softmax(-1)[next_token.ids]


before = student_probabilities()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
losses = []
for _ in range(args.steps):
    batch = rows[torch.randint(len(rows), (16,))]
    answers = teacher.topk(batch, k=32)  # ids, log-probabilities and the exact tail
    hidden = student.model(batch).last_hidden_state
    loss = fd.topk_distill_loss(hidden, student.lm_head.weight, answers)
    losses.append((loss.item(), eager_loss(hidden, student.lm_head.weight, answers).item()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
fused, eager = torch.tensor(losses).T
print(f"KL(teacher ‖ student) {fused[0]:.2f} -> {fused[-1]:.2f} nats per token")
print(f"largest relative difference from eager: {((fused - eager) / eager).abs().max():.0e}")

names = [tokenizer.decode(i).replace(" ", "␣").replace("\n", "⏎") for i in next_token.ids]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
left.plot(fused, label="topk_distill_loss")
left.plot(range(0, args.steps, 6), eager[::6], "o", ms=3.5, label="eager, from logits")
left.set(xlabel="step", ylabel="nats per token", title="The same loss, without logits", ylim=0)
left.legend()
series = {"teacher": next_token.logprobs.exp(), "student, before": before}
series[f"student, {args.steps} steps"] = student_probabilities()
for i, (label, heights) in enumerate(series.items()):
    right.bar(torch.arange(8) + 0.28 * (i - 1), heights, width=0.28, label=label)
right.set_xticks(range(8), names, family="monospace")
right.set(ylabel="probability", title=f"Next token after …{prompt.splitlines()[-1].strip()}")
right.legend()
figure.savefig(args.out / "101_loss.svg")
