"""Peak memory of the loss in bytes, without the gradients that it returns.

    N targets · H hidden size · V vocabulary · S slots of a token (its K answers and the label)
    n tokens of a chunk, as in the loss itself · v vocabulary rows of a slab · computed in fp32

    fused        4nV + dW while summed + 4nH + 4nS · (tensors on a chunk's slots)
    recompute    4vN + 4NH (dX while summed) + 4NS · (tensors on all slots)
    dense        8nV + 4VH + 4NH, with n half a chunk
    top k        4nV on a GPU, slabs on a CPU

On a CPU the products of 16-bit heads also need fp32 copies of the slab of W and of the hidden
states, and the slots are gathered in pieces. tests/training/plan/test_plan_head.py compares each
formula with the kernels' own code, run on tensors without data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...kernels import topk as topk_kernel
from ...kernels.backends import CPU_BLOCK_TOKENS
from ...kernels.engines import TRITON_BLOCK_TOKENS, TRITON_RECOMPUTE_BYTES, triton_slab_columns
from ...kernels.head import LMHead, chunk_tokens, sums_in_16_bits
from ...kernels.topk_loss import CARRIED_CHUNKS
from ...kernels.torch_gather import GATHER_BYTES
from ...kernels.torch_slabs import slabs

ACCUMULATOR = 4
# Number of fp32 tensors on a token's slots that are alive at once, in the loss and in its
# recomputation.
_LOSS_TENSORS, _RECOMPUTE_TENSORS = 20, 9
# On a CPU, number of slabs of logits in a dense divergence of two heads, and in a pass of moments.
_SLABS_OF_SUMS, _SLABS_OF_MOMENTS = 6, 5


class HeadShape(NamedTuple):
    """Shape, dtype and device of an output head."""

    V: int
    H: int
    dtype: torch.dtype
    device: str  # "cpu" or "cuda"
    trained: bool = True  # whether the loss computes its gradient

    @property
    def weight(self) -> int:
        """Bytes of the weight, and of its returned gradient."""
        return self.V * self.H * self.dtype.itemsize

    @property
    def narrow(self) -> bool:
        return self.dtype.itemsize < ACCUMULATOR

    def chunk(self, N: int) -> int:
        """Return the number of tokens in a chunk of the fused loss."""
        device = self.device if self.device == "cpu" else "meta"  # has the limits of a GPU
        weight = torch.empty(1, dtype=self.dtype, device=device).expand(self.V, self.H)
        return min(N, chunk_tokens(LMHead(weight), N, self.trained))

    def rows(self, tokens: int) -> int:
        """Return the number of vocabulary rows in a slab on a CPU."""
        return int(next(slabs(self.V, tokens, ACCUMULATOR)).stop)


class LossMemory(NamedTuple):
    """Bytes inside the loss, without hidden states, weight and returned gradients.

    `forward` may be reached before dW exists in its final type.
    """

    forward: int
    backward: int


def fused(head: HeadShape, N: int, S: int) -> LossMemory:
    """Return the memory of the fused loss.

    It is the larger of two: logits of a chunk (4nV), dW in fp32 unless summed in its own type, and
    the slots' tensors; or dW in both types, after the logits are freed.
    """
    n = head.chunk(N)
    in_16_bits = sums_in_16_bits(head.dtype)
    carried = not head.narrow or (in_16_bits and n * CARRIED_CHUNKS[head.device] >= N)
    summed = head.trained * (head.weight if carried else head.V * head.H * ACCUMULATOR)
    peak = n * head.V * ACCUMULATOR + summed + _LOSS_TENSORS * n * S * ACCUMULATOR
    if head.narrow and not in_16_bits:
        peak += N * head.H * (ACCUMULATOR - head.dtype.itemsize)  # dX is summed in fp32, too
    hidden_fp32 = n * head.H * ACCUMULATOR
    if head.device == "cpu":
        v = head.rows(n)
        gathered = min(GATHER_BYTES, n * S * head.H * ACCUMULATOR)
        peak += v * n * ACCUMULATOR if not head.narrow else 0
        peak += hidden_fp32 if not head.narrow else 2 * hidden_fp32 + v * head.H * ACCUMULATOR
        peak += gathered * 3 // 2 if in_16_bits else 0
    else:
        peak += hidden_fp32 if head.narrow else 0
    both_types = 0 if carried else summed + head.trained * head.weight
    return LossMemory(max(peak, both_types), 0)


def recomputed(head: HeadShape, N: int, S: int) -> LossMemory:
    """Return the memory of the recomputing loss.

    Forward: slabs. Backward: logits of a slab for all tokens (4vN), and dX in fp32.
    """
    slots, hidden_fp32 = _RECOMPUTE_TENSORS * N * S * ACCUMULATOR, N * head.H * ACCUMULATOR
    if head.device == "cpu":
        v = head.rows(N)
        backward = v * N * ACCUMULATOR + slots
        if head.narrow:
            backward += 2 * hidden_fp32 + 2 * v * head.H * ACCUMULATOR
        n = min(N, CPU_BLOCK_TOKENS)
        forward = _SLABS_OF_MOMENTS * n * head.rows(n) * ACCUMULATOR
        return LossMemory(forward + slots, backward)
    columns = min(triton_slab_columns(head.V), max(64, TRITON_RECOMPUTE_BYTES // (N * ACCUMULATOR)))
    # The slab uses the memory of the returned dX if it fits.
    is_reused = head.narrow and columns <= head.H // 2
    backward = (
        slots
        + (0 if is_reused else columns * N * ACCUMULATOR)
        + (hidden_fp32 if head.narrow else 0)
    )
    if head.dtype == torch.float16:
        backward += columns * head.H * ACCUMULATOR  # a slab of dW before it is rounded
    return LossMemory(
        min(N, TRITON_BLOCK_TOKENS) * triton_slab_columns(head.V) * ACCUMULATOR + slots, backward
    )


def dense(head: HeadShape, teacher: HeadShape, N: int) -> LossMemory:
    """Return the memory of a dense loss: logits of both heads for half a chunk, and gradients."""
    n = max(1, head.chunk(N) // 2)
    grads = N * head.H * ACCUMULATOR + head.trained * head.V * head.H * ACCUMULATOR
    peak = n * (head.V + teacher.V) * ACCUMULATOR + grads
    if head.device == "cpu":
        peak += _SLABS_OF_SUMS * min(4096, head.V) * n * ACCUMULATOR
    both_types = grads + head.trained * head.weight if head.narrow else 0
    # The returned dX is created at the end, after the logits are freed.
    return LossMemory(max(peak - N * head.H * head.dtype.itemsize, both_types), 0)


def topk(head: HeadShape, N: int, k: int) -> int:
    """Return the memory of a top k: logits of a chunk or slabs, and the answers of N tokens."""
    answers = N * k * (8 + 2 * ACCUMULATOR)
    if head.device == "cpu":
        n = min(N, CPU_BLOCK_TOKENS)
        v = head.rows(n)
        copied = v * head.H * ACCUMULATOR if head.narrow else 0
        return answers + 3 * v * n * ACCUMULATOR + copied
    step = max(1, min(topk_kernel.CHUNK_BYTES // (head.V * ACCUMULATOR), -(-N // 2)))
    return answers + step * head.V * ACCUMULATOR
