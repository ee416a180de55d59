"""Top-k losses with a tail for verl's on-policy distillation; importing this module adds them.

    VERL_USE_EXTERNAL_MODULES=fastdistill.compat.verl python -m verl.trainer.main_ppo \\
        distillation.distillation_loss.loss_mode=fastdistill_reverse_kl ...

    fastdistill_forward_kl  KL(teacher ‖ student)      fastdistill_reverse_kl  KL(student ‖ teacher)

Both compare the teacher's top k and one more outcome, the probability of all other tokens. verl
imports the modules of that variable in every process. Its registry has the functions that collect
the losses of responses. The losses themselves come from `compute_topk_loss`, which has one loss.
This module replaces it by a function that calls the original for every other loss_mode.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..losses.types import TopK
from ..runtime.checks import fail
from ..runtime.optional import require
from .logits_loss import topk_loss_of_logits

_verl: Any = require("verl.trainer.distillation.losses", "fastdistill.compat.verl")
_ulysses: Any = require("verl.utils.ulysses", "fastdistill.compat.verl")

DIVERGENCES = {
    "fastdistill_forward_kl": "forward_kl",
    "fastdistill_reverse_kl": "reverse_kl",
}
STRATEGIES = ("fsdp", "fsdp2", "veomni")
_PREFIX = "fastdistill_"
_compute_topk_loss = _verl.compute_topk_loss


def losses_of_logits(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """Return the losses of every token of a micro-batch, and the masses on the teacher's ids.

    Args:
        student_logits: [1, T, V], the rows of the micro-batch one after another; with sequence
            parallelism, the part of this rank.
        data: teacher_logprobs and teacher_ids, nested [rows, tokens, k].

    Returns:
        Tensors [1, T]; verl carries them to `losses_of_responses`.

    Raises:
        ValueError: an option of verl that these losses do not have.
    """
    loss_config = distillation_config.distillation_loss
    divergence = DIVERGENCES.get(loss_config.loss_mode)
    if divergence is None:
        outputs: dict[str, Tensor] = _compute_topk_loss(
            config, distillation_config, data, student_logits, data_format
        )
        return outputs
    mode = f"with loss_mode={loss_config.loss_mode}"
    if config.strategy not in STRATEGIES:
        hint = "use one of these, or another loss_mode"
        fail("strategy", f"one of {', '.join(STRATEGIES)} {mode}", config.strategy, hint)
    if loss_config.log_prob_min_clamp is not None:
        hint = "set it to null: these losses need no clamp, because they have a tail"
        fail("log_prob_min_clamp", f"null {mode}", loss_config.log_prob_min_clamp, hint)
    if getattr(loss_config, "use_chunked_topk", False):
        hint = "set it to False: these losses always read the logits in chunks"
        fail("use_chunked_topk", f"False {mode}", True, hint)
    logprobs, ids = (data[name].values()[None] for name in ("teacher_logprobs", "teacher_ids"))
    if _ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        logprobs, ids = (_ulysses.slice_input_tensor(x, dim=1) for x in (logprobs, ids))
    out = topk_loss_of_logits(student_logits, TopK(ids, logprobs), divergence)
    return {f"{_PREFIX}{name}": value for name, value in out._asdict().items()}


def losses_of_responses(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Return the losses of the response tokens [rows, longest response], and verl's metrics.

    Raises:
        ValueError: the losses were not computed, as with verl's fused kernels.
    """
    if f"{_PREFIX}loss" not in model_output:
        mode = distillation_config.distillation_loss.loss_mode
        hint = "set it to False, so that the model returns logits"
        fail("use_fused_kernels", f"False with loss_mode={mode}", "no losses of logits", hint)
    loss, student_mass, teacher_mass = (
        _verl.no_padding_2_padding(model_output[f"{_PREFIX}{name}"], data)
        for name in ("loss", "student_mass", "teacher_mass")
    )
    mask = data["response_mask"].bool()
    if mask.is_nested:
        mask = mask.to_padded_tensor(False)
    metrics = {
        "distillation/student_mass": student_mass[mask].mean().item(),
        "distillation/teacher_mass": teacher_mass[mask].mean().item(),
    }
    return loss, metrics


_settings = _verl.DistillationLossSettings(names=list(DIVERGENCES), use_topk=True)
_verl.register_distillation_loss(_settings)(losses_of_responses)
_verl.compute_topk_loss = losses_of_logits
