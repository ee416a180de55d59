"""The top-k log-probability loss of axolotl's knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses.arguments import check_divergence
from ..losses.topk import topk_distill_loss
from ..losses.types import TopK


class TopKLogprobLoss(nn.Module):
    """Replaces axolotl's LigerFusedLinearKLTopKLogprobLoss, with the same arguments.

    Returns a sum over positions:

        weight_soft_loss · T² · Σ D(p, q) + weight_hard_loss · Σ CE(label), labels shifted by one

    D is KL(p‖q) at beta=0, KL(q‖p) at beta=1, else β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q, over
    the K tokens of each position. With normalize_topk the student is renormalized over them, as
    axolotl's data step does with the teacher (tail="renorm_both": no pass over the LM head);
    without, it keeps its own probabilities. The gradient includes T², as the loss does (the
    gradient of axolotl 0.19.0 omits it).

    Without normalize_topk and with beta=1, axolotl sums q log(q/p) over the K tokens. Its minimum
    is at q = p/e, so it trains a student away from its teacher. Here D is the sum of
    q log(q/p) + p − q, whose minimum is 0 at q = p. With beta=0 it is axolotl's loss, whose minimum
    is the teacher renormalized over the K tokens. This needs allow_biased=True, as forward_kl with
    tail="truncate" does in `topk_distill`.

    Args:
        weight_hard_loss, weight_soft_loss: factors of the two sums.
        temperature: T of target_logprobs; divides the student's logits.
        beta, ignore_index, compute_ce_loss, normalize_topk: see above.
        compiled, chunk_size: accepted for compatibility and ignored; the loss is always fused.
        allow_biased: accept beta=0 without normalize_topk, a loss whose minimum is not at the
            teacher.

    Raises:
        ValueError: beta outside [0, 1]; a biased loss without allow_biased.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
        allow_biased: bool = False,
    ) -> None:
        super().__init__()
        self.divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
        self.tail = "renorm_both" if normalize_topk else "truncate"
        self.allow_biased = allow_biased
        check_divergence(self.divergence, beta, 0.0, self.tail, allow_biased)
        self.weight_hard_loss = weight_hard_loss if compute_ce_loss else 0.0
        self.weight_soft_loss = weight_soft_loss
        self.temperature = temperature
        self.beta = beta
        self.ignore_index = ignore_index
        self.normalize_topk = normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,  # (V, H)
        student_hidden_states: Tensor,  # (B, T, H)
        target_token_ids: Tensor,  # (B, T, K), position t predicts the token at t + 1
        target_logprobs: Tensor,  # (B, T, K)
        target_mask: Tensor,  # (B, T, K), 0 where a slot is empty
        true_labels: Tensor,  # (B, T), unshifted
        student_bias: Tensor | None = None,  # (V,)
    ) -> Tensor:  # scalar
        used = target_mask.bool()
        total = student_hidden_states.new_zeros((), dtype=torch.float32)
        if self.weight_soft_loss:
            teacher = TopK(
                torch.where(used, target_token_ids, -1),
                torch.where(used, target_logprobs.float(), 0.0),
                temperature=self.temperature,
            )
            soft = topk_distill_loss(
                student_hidden_states,
                lm_head_weight,
                teacher,
                divergence=self.divergence,
                beta=self.beta,
                tail=self.tail,
                allow_biased=self.allow_biased,
                temperature=self.temperature,
                t2_scale=True,
                token_weight=used.any(-1).float(),
                reduction="sum",
                bias=student_bias,
            )
            total = total + self.weight_soft_loss * soft
        if self.weight_hard_loss:
            labels = torch.full_like(true_labels, self.ignore_index)
            labels[:, :-1] = true_labels[:, 1:]
            empty = torch.full((*labels.shape, 1), -1, device=labels.device)
            hard = topk_distill_loss(
                student_hidden_states,
                lm_head_weight,
                TopK(empty, torch.zeros_like(empty, dtype=torch.float32)),
                labels=labels,
                ce_weight=1.0,
                ignore_index=self.ignore_index,
                reduction="sum",
                bias=student_bias,
            )
            total = total + self.weight_hard_loss * hard
        return total
