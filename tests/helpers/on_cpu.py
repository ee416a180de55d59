"""Sharded training on two gloo processes: what accelerate keeps for accelerators, and counters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

SEEN: dict[str, int] = {"head_gathered": 0, "passes": 0}


def fsdp2(model: Any, options: dict[str, Any], out: Path, *more: str) -> Any:
    """accelerate's FSDP2, with the process type it would see on GPUs."""
    import accelerate.state as states

    begin = states.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == states.DistributedType.MULTI_CPU:
            shared = states.AcceleratorState._shared_state
            shared |= {"distributed_type": states.DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}

    states.AcceleratorState.__init__ = init
    options |= {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", *more],
        },
    }
    _count_gathers(model)
    return model


def fsdp2_every_linear(model: Any, options: dict[str, Any], out: Path) -> Any:
    return fsdp2(model, options, out, "Linear")


def _count_gathers(model: Any) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    names_of_groups: Any = vars(groups)
    gather = names_of_groups["foreach_all_gather"]

    def counted(params: list[Any], *args: Any, **kwargs: Any) -> Any:
        names = [p._param_fqn or "" for p in params]
        tied = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
        SEEN["head_gathered"] += any(name.endswith(tied) for name in names)
        return gather(params, *args, **kwargs)

    names_of_groups["foreach_all_gather"] = counted
    model.model.register_forward_pre_hook(lambda *_: SEEN.update(passes=SEEN["passes"] + 1))


def tensor_parallel(model: Any, options: dict[str, Any], out: Path) -> Any:
    """transformers' tensor parallelism, whose plan shards the head over the vocabulary."""
    import accelerate.parallelism_config as parallelism
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    parallelism.ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    folder = out / f"model-{os.environ['RANK']}"
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
    )


def zero3(model: Any, options: dict[str, Any], out: Path) -> Any:
    """DeepSpeed ZeRO-3 on its CPU accelerator, which accelerate counts as a single process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_SIZE": "2"}
    from accelerate.state import PartialState
    from transformers import TrainingArguments

    rank = int(os.environ["RANK"])
    TrainingArguments.world_size = property(lambda self: 2)
    options |= {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 12,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    }
    process = TrainingArguments.__post_init__

    def counted(self: Any) -> None:
        process(self)
        ranks = {"num_processes": 2, "process_index": rank, "local_process_index": rank}
        PartialState._shared_state |= ranks

    TrainingArguments.__post_init__ = counted
    if options.pop("from_path", False):
        model.save_pretrained(folder := out / f"model-{rank}")
        return str(folder)  # partitioned while it is loaded
    return model


SETUPS = {
    "fsdp2": fsdp2,
    "fsdp2_every_linear": fsdp2_every_linear,
    "tensor_parallel": tensor_parallel,
    "zero3": zero3,
}


def seen(trainer: Any) -> dict[str, Any]:
    """What the run did to the head: gathers, and what is left of it here."""
    weight = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return SEEN | {"sharded": local is not weight, "rows": local.shape[0]}


def whole(trainer: Any) -> torch.Tensor:
    """All parameters, gathered."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = list(model.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().flatten().clone() for p in parameters])
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in full])
