"""Training whose memory is planned, and then measured by torch's allocator."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from benchmarks.memory import peak_mb
from fastdistill.quant import quantize_model
from fastdistill.teachers.local import Teacher
from fastdistill.training.config import DistillConfig
from fastdistill.training.plan import Plan, Settings, plan_memory
from fastdistill.training.trainer import DistillTrainer

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
STEPS = 2  # in the second one the optimizer's state is there from the start
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A student, perhaps a teacher, and settings that the plan and the trainer share."""

    family: str = "llama"
    dtype: str = "float32"
    size: dict[str, int] = field(default_factory=dict)
    seq: int = 192
    batch: int = 4
    teacher: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of Settings

    def config(self, *, tied: bool = True) -> Any:
        size = {"V": 8000, "H": 256, "layers": 3} | self.size
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if self.family == "gpt2":
            return GPT2Config(
                vocab_size=size["V"], n_embd=size["H"], n_layer=size["layers"], n_head=4, **special
            )
        return FAMILIES[self.family](
            vocab_size=size["V"],
            hidden_size=size["H"],
            intermediate_size=3 * size["H"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["H"] // 64,
            num_key_value_heads=size["H"] // 128,
            head_dim=64,
            max_position_embeddings=self.seq,
            tie_word_embeddings=tied,
            **special,
        )


def planned(run: Run, folder: Path) -> Plan:
    run.config().save_pretrained(folder / "student")
    teacher = None
    if run.teacher:
        teacher = folder / "teacher"
        config = run.config(tied=False)
        config.dtype = getattr(torch, run.dtype)
        config.save_pretrained(teacher)
    return plan_memory(
        folder / "student",
        teacher,
        settings=Settings(seq=run.seq, batch=run.batch, dtype=run.dtype, **run.options),
        device=DEVICE,
        gpu=torch.cuda.get_device_properties(0).total_memory if ON_GPU else None,
    )


def measured(run: Run, folder: Path) -> float:
    """Bytes that torch's allocator holds at most, weights included, in a training of STEPS."""
    options = dict(run.options)
    student, teacher = _model(run.config(), run), None
    rank, quant = options.pop("lora_rank", None), options.pop("teacher_quant", None)
    if run.teacher:
        model = _model(run.config(tied=False), run)
        if quant is not None:
            quantize_model(model, quant, compute="exact")
        teacher = Teacher(model)
    accumulation = options.pop("accumulation", 1)
    args = DistillConfig(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=accumulation,
        use_cpu=not ON_GPU,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        show_panel=False,
        dataloader_pin_memory=False,
        ce_weight=float(teacher is None),
        **options,
    )
    trainer = DistillTrainer(
        student,
        teacher,
        args,
        peft_config=_lora(rank),
        train_dataset=_rows(run, STEPS * run.batch * accumulation),
    )
    models = [trainer.model, *([] if teacher is None else [teacher.model])]
    held = sum(t.nbytes for m in models for t in (*m.parameters(), *m.buffers()))
    gc.collect()
    return held + 1e6 * peak_mb(trainer.train)


def _model(config: Any, run: Run) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)  # answers that differ between positions
    return model.to(DEVICE)


def _rows(run: Run, count: int) -> list[dict[str, Any]]:
    """Whole rows, and among several in a batch some that are shorter."""
    g = torch.Generator().manual_seed(0)
    vocab = run.config().vocab_size
    lengths = [run.seq - 3 * (i % run.batch) for i in range(count)]
    return [{"input_ids": torch.randint(3, vocab, (n,), generator=g)} for n in lengths]


def _lora(rank: int | None) -> Any:
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def error_of(run: Run) -> tuple[float, str]:
    """How far the plan is from what was measured, as a share; and both in MB."""
    with tempfile.TemporaryDirectory() as folder:
        plan = planned(run, Path(folder))
        peak = measured(run, Path(folder))
    phases = ", ".join(f"{p.name} {p.bytes / 1e6:.1f}" for p in plan.memory.phases)
    summary = f"planned {plan.peak / 1e6:.1f} MB ({phases}), measured {peak / 1e6:.1f} MB"
    return plan.peak / peak - 1, f"{run}: {summary}"
