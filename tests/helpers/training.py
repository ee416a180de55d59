"""Small students, teachers and runs that the trainer's tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill.training.config import DistillConfig
from fastdistill.training.trainer import DistillTrainer

VOCAB = 53


def llama(seed: int, *, vocab=VOCAB, hidden=32, scale=1.0, tied=False, positions=64):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # a peaked teacher, so that mistakes are not rounding
    return model


def ragged(n: int = 12):
    """Sequences of 4 to 23 tokens; in some a prompt is no target."""
    rows = []
    for index in range(n):
        g = torch.Generator().manual_seed(index)
        length = 4 + (index * 7) % 20
        ids = torch.randint(3, VOCAB - 3, (length,), generator=g)
        labels = ids.clone()
        labels[: (index % 3) * 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def config(tmp_path, **options):
    defaults: dict[str, Any] = {
        "k": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 12,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "show_panel": False,
        "report_to": [],
    }
    return DistillConfig(str(tmp_path / "run"), **(defaults | options))


def peaked(seed: int = 7):
    """A teacher of another width whose answers differ clearly from the student's."""
    return llama(seed, hidden=48, scale=20.0)


def build(tmp_path, *, teacher="default", model=None, data=None, **options):
    """A trainer; what is no option of DistillConfig goes to it."""
    for name in ("eval_dataset", "processing_class", "peft_config", "callbacks"):
        if name in options:
            options.setdefault("trainer", {})[name] = options.pop(name)
    return DistillTrainer(
        llama(0) if model is None else model,
        peaked() if isinstance(teacher, str) and teacher == "default" else teacher,
        **{"train_dataset": data or ragged(), **options.pop("trainer", {})},
        args=config(tmp_path, **options),
    )


def train(tmp_path, **options):
    trainer = build(tmp_path, **options)
    trainer.train()
    return trainer


def weights(trainer):
    return flat(trainer.model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dense(student, teacher, rows, *, k=8, temperature=1.0):
    """Per-target KL with bucket tail, nll and agreement, from full logits, row by row."""
    kls, nlls, agree = [], [], []
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"][1:]
        keep = labels != -100
        with torch.no_grad():
            s = student(input_ids=ids).logits[0, :-1].double()
            t = teacher(input_ids=ids).logits[0, :-1].double()
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        top, index = p.topk(k, dim=-1)
        q_top = q.gather(-1, index)
        p_all = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
        q_all = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], -1)
        kls.append((p_all * (p_all.log() - q_all.log())).sum(-1)[keep])
        nlls.append(F.cross_entropy(s, labels, ignore_index=-100, reduction="none")[keep])
        agree.append((s.argmax(-1) == t.argmax(-1))[keep].double())
    return torch.cat(kls), torch.cat(nlls), torch.cat(agree)
