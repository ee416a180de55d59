"""Distill a student on a laptop, one GPU, eight GPUs or several nodes (see many_gpus.md).

    python examples/distill.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-8B \\
        --teacher_quant nf4 --data train.jsonl --output_dir out --bf16

Each row of the data has messages, prompt and completion, text, or input_ids. It is a .jsonl, .json,
.parquet or .csv file, a folder saved by datasets, or a name on the hub with its split
(owner/name:train). Every field of DistillConfig is an option. Re-run the same command to resume
from the last finished checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from fastdistill import DistillConfig, DistillTrainer, load_teacher
from fastdistill.hf.open_dataset import open_dataset


@dataclass
class Script:
    student: str = field(metadata={"help": "path or name of the model to train"})
    teacher: str = field(metadata={"help": "path or name of the model to learn from"})
    data: str = field(metadata={"help": "rows to train on"})
    eval_data: str | None = field(default=None, metadata={"help": "rows to evaluate on"})
    teacher_quant: str | None = field(default=None, metadata={"help": "nf4, fp4, int4 or int8"})
    lora_rank: int | None = field(default=None, metadata={"help": "train adapters, not weights"})
    tensor_parallel: int = field(default=1, metadata={"help": "ranks that share one student"})


def main() -> None:
    script, config = HfArgumentParser((Script, DistillConfig)).parse_args_into_dataclasses()
    student: Any = script.student
    if script.tensor_parallel > 1:
        from transformers.distributed import DistributedConfig

        ranks = DistributedConfig(tp_size=script.tensor_parallel)
        student = AutoModelForCausalLM.from_pretrained(
            student, distributed_config=ranks, trust_remote_code=False
        )
    adapters = None
    if script.lora_rank is not None:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=script.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = DistillTrainer(
        student,
        load_teacher(script.teacher, quant=script.teacher_quant, device=config.device),
        config,
        train_dataset=open_dataset(script.data),
        eval_dataset=None if script.eval_data is None else open_dataset(script.eval_data),
        processing_class=AutoTokenizer.from_pretrained(script.student, trust_remote_code=False),
        peft_config=adapters,
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    if script.eval_data is not None:
        trainer.evaluate()


if __name__ == "__main__":
    main()
