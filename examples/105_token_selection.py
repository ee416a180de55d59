"""Train on a quarter of the tokens, selected by a score of the student.

python examples/105_token_selection.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus, models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

teacher, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
library = corpus.standard_library()
size = {"tokenizer": tokenizer, "length": 64}
train = corpus.packed_windows(library.train, max_windows=16 * args.steps, **size)
held_out = corpus.document_windows(library.held_out[:30], per_document=2, **size)
train, held_out = ([{"input_ids": row} for row in part.ids] for part in (train, held_out))
kl, students = {}, {}
for rule in (None, "entropy top 0.25", "entropy bottom 0.25"):
    student = models.new_llama(models.STUDENT, vocab_size=len(tokenizer), seed=0)
    config = fd.DistillConfig(
        args.out / "run",
        token_selection=rule,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        show_panel=False,
        use_cpu=True,
    )
    trainer = fd.DistillTrainer(student, teacher, config, train_dataset=train)
    trainer.train()
    name = rule or "all tokens"
    kl[name], students[name] = trainer.evaluate(held_out)["eval_kl"], student.eval()
    print(f"{name}: KL(teacher ‖ student) {kl[name]:.2f} on held-out files")

text = """def first_line(path, default=None):
    if not os.path.exists(path):
        return default
    with open(path, encoding="utf-8") as file:
        for line in file:
            return line.rstrip()
    raise ValueError("the file %r is empty" % path)"""
student = students["all tokens"]
ids = torch.tensor([tokenizer.encode(text)])
with torch.no_grad():
    hidden = student.model(ids).last_hidden_state
entropy = fd.token_scores(hidden, student.lm_head.weight).entropy[0, :-1].tolist()
bound = sorted(entropy)[-(len(entropy) // 4)]
shade = plt.Normalize(min(entropy), 2 * max(entropy) - min(entropy))

figure, (code, bars) = plt.subplots(2, 1, figsize=(7.5, 5), height_ratios=(1.8, 1))
code.set(xlim=(0, 54), ylim=(7, -0.3), xticks=[], yticks=[], frame_on=False)
code.set_title("Color: the student's entropy at each token. Frame: the top quarter")
line = column = 0
for token, score in zip(ids[0].tolist(), [min(entropy), *entropy], strict=True):
    for i, part in enumerate(tokenizer.decode(token).split("\n")):
        line, column = (line + 1, 0) if i else (line, column)
        color, edge = plt.cm.Blues(shade(score)), "C1" if score >= bound else "none"
        code.add_patch(plt.Rectangle((column, line), len(part), 0.9, fc=color, ec=edge))
        code.text(column, line + 0.7, part, family="monospace", fontsize=13)
        column += len(part)
drawn = bars.barh(list(kl), list(kl.values()), height=0.6, color=["gray", "C1", "C0"])
bars.bar_label(drawn, fmt="%.2f", padding=3)
bars.invert_yaxis()
bars.set_xlabel(f"KL(teacher ‖ student) on held-out files after {args.steps} steps; one seed")
figure.savefig(args.out / "105_token_selection.svg")
