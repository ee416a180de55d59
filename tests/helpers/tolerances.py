"""The error budget of every test, in one place: relative to fp64 truth on the same operands.

‖a − b‖ / ‖b‖ for gradients; the same for values. bfloat16 gradients: dz rounded once and the
result rounded once, 2⁻⁹ each at worst. Shapes of a few numbers come close to that sum; where there
is something to average over, near convergence too, PROMISED holds.
"""

import torch
from torch import Tensor

VALUE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-5,  # operands are exact, logits fp32
    torch.float16: 2e-5,
}
GRADIENT = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2 * 2**-9,
    torch.float16: 1e-3,
}

PROMISED = GRADIENT | {torch.bfloat16: 3e-3}


def relative(actual: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in fp64; absolute where the truth is zero."""
    actual, truth = actual.detach().double(), truth.detach().double()
    size = truth.norm()
    return float((actual - truth).norm() / (size if size > 0 else 1.0))


def assert_close(
    actual: Tensor | None, truth: Tensor | None, budget: float, what: str = ""
) -> None:
    assert actual is not None, what
    assert truth is not None, what
    error = relative(actual, truth)
    assert error <= budget, f"{what}: relative error {error:.3g} > {budget:.3g}"
