"""A plugin for axolotl that trains its model on the answers of a teacher.

    plugins:
      - fastdistill.compat.axolotl_plugin.DistillPlugin
    fastdistill:
      teacher: path/of/teacher  # a checkpoint, .gguf file, cache or URL, as in load_teacher
      k: 64

The loss replaces axolotl's cross-entropy, at the same targets. It is computed at the input of the
LM head, without logits. The teacher reads each sequence of a packed row by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from ..hf.lm_head import LMHead, at_head, head_of
from ..runtime.checks import fail
from ..runtime.optional import require
from ..teachers.local import load_teacher
from ..training.config import DistillConfig
from ..training.loss import Loss
from ..training.teacher_answers import get_answers
from ..training.teacher_setup import resolve_teacher
from .packed_rows import sequences_of

_axolotl: Any = require("axolotl.integrations.base", "fastdistill.compat.axolotl_plugin")

# The options of `fastdistill:` in the YAML: arguments of load_teacher, and fields of DistillConfig.
_TEACHER = ("teacher", "quant")
_LOSS = (
    *("k", "support", "divergence", "beta", "skew", "tail", "allow_biased", "temperature"),
    *("t2_scale", "ce_weight", "z_loss", "token_selection", "impl"),
)
# Options of axolotl that choose another loss, or hide the head's input from this one.
_OTHER_LOSSES = (
    *("rl", "reward_model", "process_reward_model", "kd_trainer", "use_eaft"),
    *("torch_compile", "processor_type"),
)


class DistillArgs(BaseModel):
    """The schema of the key that the plugin adds to axolotl's configuration."""

    fastdistill: dict[str, Any] | None = None


class DistillPlugin(_axolotl.BasePlugin):
    """Trains axolotl's model on the answers of a teacher; see the top of this file."""

    def register(self, cfg: Mapping[str, Any]) -> None:
        options = cfg.get("fastdistill")
        if not options or not options.get("teacher"):
            hint = "name a checkpoint, .gguf file, cache or URL as fastdistill.teacher"
            fail("fastdistill", "a mapping with teacher in the YAML", repr(options), hint)
        if unknown := sorted(options.keys() - {*_TEACHER, *_LOSS}):
            hint = "correct the name, or remove the option"
            fail("fastdistill", f"options among {', '.join(_TEACHER + _LOSS)}", unknown[0], hint)
        for name in _OTHER_LOSSES:
            if cfg.get(name):
                expected = "none with fastdistill.compat.axolotl_plugin"
                fail(name, expected, repr(cfg.get(name)), "remove it from the YAML")
        if (cfg.get("context_parallel_size") or 1) > 1:
            fail("context_parallel_size", "1, with whole rows", cfg.get("context_parallel_size"))

    def get_input_args(self) -> str:
        return f"{__name__}.DistillArgs"

    def get_trainer_cls(self, cfg: Any) -> type:
        base: Any = require("axolotl.core.trainers.base", "DistillPlugin").AxolotlTrainer
        return type("AxolotlDistillTrainer", (_TrainsOnTeacher, base), {})

    def pre_model_load(self, cfg: Any) -> None:
        # It comes before axolotl's own training arguments, because each object of them resets the
        # state of accelerate.
        options = {name: value for name, value in cfg.fastdistill.items() if name in _LOSS}
        self.config = DistillConfig(output_dir=cfg.output_dir, **options)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        options = cfg.fastdistill
        teacher = load_teacher(
            options["teacher"], quant=options.get("quant"), device=trainer.args.device
        )
        if getattr(trainer.model.config, "output_router_logits", False):
            hint = "set it to False: the plugin does not add the router's loss"
            expected = "False, since the loss is computed at the head"
            fail("output_router_logits", expected, True, hint)
        resolved = resolve_teacher(teacher, trainer.model, self.config, trainer.processing_class)
        trainer.distillation = (*resolved, Loss(self.config, self.config.selection))
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by num_items_in_batch


class _TrainsOnTeacher:
    """A mixin for axolotl's trainer, with our loss; the plugin sets `distillation`."""

    distillation: tuple[Any, int | None, Loss]
    accelerator: Any

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        teacher, valid_vocab, loss = self.distillation
        inputs = dict(inputs)
        batch, positions = sequences_of(inputs, inputs.pop("labels"))
        targets, answers = get_answers(teacher, batch, loss.config, check=False, vocab=valid_vocab)
        sources = targets.gather(positions)
        count = max(len(sources), 1) if num_items_in_batch is None else num_items_in_batch
        student = self.accelerator.unwrap_model(model)

        def use(hidden: Tensor) -> dict[str, Tensor]:
            head: LMHead = head_of(student)._replace(valid_vocab=valid_vocab)
            total = loss(hidden.flatten(0, 1)[sources], head, targets, answers).loss
            return {"loss": total / count}

        with at_head(student, use):
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch
            )
