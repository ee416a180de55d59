"""Store a teacher's answers once, then train from the folder without the teacher.

python examples/103_cache.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from transformers import PrinterCallback

from fastdistill import DistillConfig, DistillTrainer, TeacherCache
from fastdistill.alignment.experiment.demo import corpus, models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

teacher, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
library = corpus.standard_library()
windows = corpus.packed_windows(library.train, tokenizer, length=96, max_windows=16 * args.steps)
train = [{"input_ids": row} for row in windows.ids]

# Run it again to resume a build that was stopped.
folder = args.out / f"answers-to-{len(train)}-rows"
cache = TeacherCache.build(teacher, train, folder, k=64, tokenizer=tokenizer)
cache.verify()
sizes = {}
for k in (8, 16, 32, 64):
    part = args.out / f"answers-k-{k}"
    TeacherCache.build(teacher, train[:32], part, k=k, tokenizer=tokenizer)
    stored = sum(file.stat().st_size for file in part.rglob("*.safetensors"))
    sizes[f"k = {k}"] = stored / windows.ids[:32].numel()
sizes["logits, fp16"] = 2 * len(tokenizer)


def distill(name, teacher):
    """Return the losses by step of a new student, and the seconds of its training."""
    config = DistillConfig(
        args.out / name,
        k=64,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        show_panel=False,
        use_cpu=True,
    )
    student = models.new_llama(models.STUDENT, vocab_size=len(tokenizer), seed=0)
    data = {"train_dataset": train, "processing_class": tokenizer}
    trainer = DistillTrainer(student, teacher, config, **data)
    trainer.remove_callback(PrinterCallback)
    seconds = trainer.train().metrics["train_runtime"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], seconds


memory, seconds_memory = distill("from-memory", teacher)
stored, seconds_stored = distill("from-cache", folder)
difference = max(abs(a - b) / a for a, b in zip(memory, stored, strict=True))
print(f"largest relative difference of the losses: {difference:.1e}")
print(f"training: {seconds_memory:.1f} s with the teacher, {seconds_stored:.1f} s from the cache")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
left.plot(memory, label="teacher in memory")
left.plot(range(0, args.steps, 3), stored[::3], "o", ms=3.5, label="cache, k = 64")
left.set(xlabel="step", ylabel="nats per token", title="The loss of a training run", ylim=0)
left.legend()
bars = right.barh(list(sizes), list(sizes.values()), color=["C1"] * 4 + ["gray"])
right.bar_label(bars, fmt="{:,.0f}", padding=3)
right.set(xscale="log", xlim=(10, 4 * max(sizes.values())), xlabel="bytes per token")
right.set_title(f"Size on disk; vocabulary of {len(tokenizer):,}")
right.grid(axis="y", visible=False)
figure.savefig(args.out / "103_cache.svg")
