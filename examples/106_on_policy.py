"""Let the teacher score what the student itself writes (generalized knowledge distillation).

python examples/106_on_policy.py --out out
"""

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus, models

PROMPT, ANSWER = 24, 48  # tokens
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

teacher, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
library = corpus.standard_library()
size = {"tokenizer": tokenizer, "length": PROMPT + ANSWER}
train = corpus.packed_windows(library.train, max_windows=16 * args.steps, **size).ids
held_out = corpus.document_windows(library.held_out[:64], per_document=3, **size).ids
# Everything before the first target is the prompt; the rest is sampled in an on-policy step.
labels = train.clone()
labels[:, :PROMPT] = -100
rows = [{"input_ids": a, "labels": b} for a, b in zip(train, labels, strict=True)]


def distill(student, **options):
    """Return a copy of the student after `args.steps` more steps."""
    config = fd.DistillConfig(
        args.out / "run",
        max_new_tokens=ANSWER,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        show_panel=False,
        use_cpu=True,
        **options,
    )
    student, data = copy.deepcopy(student), {"train_dataset": rows, "processing_class": tokenizer}
    fd.DistillTrainer(student, teacher, config, **data).train()
    return student.eval()


@torch.no_grad()
def kl_by_position(student, ids):
    """Return KL(teacher ‖ student) at each position of the answers, averaged over rows."""
    hidden = student.model(ids).last_hidden_state
    scores = fd.token_scores(hidden, student.lm_head.weight, teacher=teacher.topk(ids, k=64))
    return scores.forward_kl[:, PROMPT - 1 : -1].mean(0)


start = distill(models.new_llama(models.STUDENT, vocab_size=len(tokenizer), seed=0))
students = {"off-policy": distill(start), "on-policy": distill(start, lmbda=1.0)}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for name, student in students.items():
    torch.manual_seed(0)
    sampling = {"do_sample": True, "min_new_tokens": ANSWER, "max_new_tokens": ANSWER}
    own = student.generate(held_out[:, :PROMPT], pad_token_id=0, **sampling)
    print(f"{name} sample: {tokenizer.decode(own[0, PROMPT:])!r}")
    for axes, ids in zip(panels, (own, held_out), strict=True):
        kl = kl_by_position(student, ids)
        means = kl.view(-1, 4).mean(1)  # of four positions each
        axes.plot(range(2, ANSWER, 4), means, "o-", ms=4, label=f"{name}: mean {kl.mean():.2f}")
for axes, title in zip(panels, ("On the student's own text", "On held-out text"), strict=True):
    axes.set(title=title, xlabel="token of the continuation", ylim=0)
    axes.legend()
panels[0].set_ylabel("KL(teacher ‖ student), nats")
figure.savefig(args.out / "106_on_policy.svg")
