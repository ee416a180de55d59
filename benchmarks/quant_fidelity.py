"""The effect of each quantization on a trained model: KL(full ‖ quantized), top-1 agreement.

On the demo's teacher (4 layers, H=256, trained on Python's standard library) and held-out files
of that library, in nats per token at T=1 over the whole vocabulary. The layers of bitsandbytes are
measured in the same model by the same code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

import fastdistill as fd
from fastdistill.alignment.experiment.demo import corpus
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from fastdistill.quant.model import targets
from fastdistill.quant.schemes import SCHEMES

from . import quant_peers
from .registry import attempt
from .rows import Row
from .shapes import Shape

SHAPE = Shape(N=64, H=256, V=2048, K=0)  # N: sequences of 256 tokens
LENGTH = 256


def _ours(scheme: str, compute: str) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda model: fd.quantize_model(model, scheme, compute=compute)


def _bitsandbytes(training: bool) -> Callable[[PreTrainedModel], nn.Module]:
    def make(model: PreTrainedModel) -> nn.Module:
        for name, linear in list(targets(model)):
            layer = quant_peers.bnb4(linear.get_parameter("weight").detach(), training)
            model.set_submodule(name, layer)
        return model

    return make


CONTENDERS = {
    "bitsandbytes NF4, train": _bitsandbytes(training=True),
    "bitsandbytes NF4, eval": _bitsandbytes(training=False),
    **{
        f"{scheme}, {compute}": _ours(scheme, compute)
        for scheme in SCHEMES
        for compute in ("exact", "int8")
    },
}


def rows(shape: Shape = SHAPE) -> list[Row]:
    full, tokenizer, _ = shipped_teacher()
    text = corpus.standard_library().held_out
    windows = corpus.document_windows(text, tokenizer, length=LENGTH, per_document=2)
    batch = {"input_ids": windows.ids[: SHAPE.N]}
    config: Any = full.model.config
    sizes = Shape(SHAPE.N, config.hidden_size, config.vocab_size, 0)
    results = []
    for name, make in CONTENDERS.items():
        row = Row.at(sizes, "fidelity", name, "forward")
        model = copy.deepcopy(full.model).bfloat16()

        def work(make=make, model=model) -> fd.FidelityReport:
            return _FixedTeacher(make(model)).fidelity(batch, against=full)

        report, reason = attempt(work)
        row.set_reason(reason)
        if report is not None:
            row.kl, row.top1_agreement = report.kl, report.top1_agreement
            row.kl_low, row.kl_high = report.kl_interval
        results.append(row)
    return results


class _FixedTeacher(fd.Teacher):
    """A Teacher that does not leave train mode, in which bitsandbytes expands its weights."""

    def __init__(self, model: nn.Module) -> None:
        training = {m: m.training for m in model.modules()}
        super().__init__(model)
        for module, mode in training.items():
            module.training = mode


def table(rows: list[Row]) -> str:
    lines = [f"{'fidelity':26} {'KL, nats/token':>15} {'95 %':>22} {'same top token':>15}"]
    for row in rows:
        if row.missing:
            lines.append(f"{row.impl:26} missing: {row.reason}")
            continue
        interval = f"[{row.kl_low:.5f}, {row.kl_high:.5f}]"
        lines.append(f"{row.impl:26} {row.kl:15.5f} {interval:>22} {row.top1_agreement:15.2%}")
    return "\n".join(lines)
