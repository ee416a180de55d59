"""Distill a teacher with DistillTrainer, and compare with training on the labels alone.

python examples/102_trainer.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fastdistill import DistillConfig, DistillTrainer
from fastdistill.alignment.experiment.demo import corpus, models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

teacher, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
library = corpus.standard_library()
train = corpus.packed_windows(library.train, tokenizer, length=96, max_windows=16 * args.steps).ids
held_out = corpus.document_windows(library.held_out[:16], tokenizer, length=96, per_document=2).ids


def distill(name, teacher, **options):
    """Return the trainer's log after training an equal student on equal data."""
    config = DistillConfig(
        args.out / name,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=max(1, args.steps // 5),
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = DistillTrainer(
        models.new_llama(models.STUDENT, vocab_size=len(tokenizer), seed=0),
        teacher,
        config,
        train_dataset=[{"input_ids": row} for row in train],
        eval_dataset=[{"input_ids": row} for row in held_out],
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]


logs = {
    "labels only": distill("labels", None, ce_weight=1.0),
    "distilled, k = 64": distill("distilled", teacher, k=64),
}
with torch.no_grad():
    floor = teacher.model(held_out, labels=held_out).loss.exp().item()
print(f"held-out perplexity: teacher {floor:.1f}")
figure, axes = plt.subplots(figsize=(6.5, 4))
for name, log in logs.items():
    print(f"  {name}: {log[0]['eval_perplexity']:.0f} -> {log[-1]['eval_perplexity']:.1f}")
    axes.plot([e["step"] for e in log], [e["eval_perplexity"] for e in log], "o-", ms=4, label=name)
axes.axhline(floor, color="gray", ls="--", lw=1, label="teacher")
axes.set(yscale="log", xlabel="step", ylabel="perplexity on held-out modules")
axes.set_title("Equal students, data and steps; one seed")
axes.legend()
figure.savefig(args.out / "102_trainer.svg")
