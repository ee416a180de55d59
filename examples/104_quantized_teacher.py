"""Quantize a teacher in every format, and measure its error and its size.

python examples/104_quantized_teacher.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fastdistill import load_teacher
from fastdistill.alignment.experiment.demo import corpus, models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--documents", type=int, default=40, help="held-out files to measure on")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

full, tokenizer, _ = models.shipped_teacher()  # a small Llama, trained on Python source
documents = corpus.standard_library().held_out[: args.documents]
batch = {"input_ids": corpus.document_windows(documents, tokenizer, length=96, per_document=2).ids}


def megabytes(model):
    """Return the size of the weights in the layers, without the embedding."""
    tensors = [*model.model.layers.parameters(), *model.model.layers.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


settings = [("int8", "exact"), ("int8", "int8"), ("nf4", "exact"), ("nf4", "int8")]
settings += [("int4", "exact"), ("fp4", "exact")]
names, reports, sizes = [], [], []
for quant, compute in settings:
    # Any folder or hub name of safetensors; the layers are quantized while they are read.
    teacher = load_teacher(
        models.shipped_folder(), quant=quant, compute=compute, dtype=torch.float32
    )
    report = teacher.fidelity(batch, against=full)
    names.append(f"{quant}, {compute} products")
    reports.append(report)
    sizes.append(megabytes(teacher.model))
    print(f"{names[-1]:>20}: {sizes[-1]:5.2f} MB; {report}")

figure, (kl, top, size) = plt.subplots(
    1, 3, figsize=(9.5, 3.2), sharey=True, width_ratios=(1.3, 1, 1)
)
rows = range(len(names))
means = [report.kl for report in reports]
ends = list(zip(*(report.kl_interval for report in reports), strict=True))
kl.hlines(rows, *ends, color="C0")
kl.plot(means, rows, "o", color="C0")
kl.set(xscale="log", xlabel="nats per token", title="KL(full ‖ quantized)")
kl.set_yticks(rows, names)
kl.invert_yaxis()
same = [100 * report.top1_agreement for report in reports]
ends = zip(*(report.top1_interval for report in reports), strict=True)
top.hlines(rows, *([100 * value for value in end] for end in ends), color="C2")
top.plot(same, rows, "o", color="C2")
top.set(xlabel="% of tokens", title="Same top token")
bars = size.barh(rows, sizes, color="C1", height=0.6)
size.bar_label(bars, fmt="%.1f", padding=3)
before = megabytes(full.model)
size.axvline(before, color="gray", ls="--", lw=1)
size.set(xlabel=f"MB; dashed: {before:.1f} in fp32", title="Weights of the layers")
figure.suptitle(f"{report.tokens:,} held-out tokens; intervals are 95 %", fontsize=9, color="gray")
figure.savefig(args.out / "104_quantized_teacher.svg")
