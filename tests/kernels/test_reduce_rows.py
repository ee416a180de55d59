"""The two largest logits of a row that is longer than one block of the kernel's last loop."""

import pytest
import torch

from fastdistill.kernels.gpu_rows import Running
from fastdistill.kernels.head import LMHead
from helpers.present import present

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_two_largest_of_a_long_row():
    """Row 0: the second follows the first in its lane, a block later. Row 1: equal logits."""
    V = 140_000
    raw = torch.zeros(2, V)
    raw[0, 5], raw[0, 5 + 66 * 2048], raw[0, 77] = 3.0, 2.0, 1.0
    raw[1, [90_000, 90_000 + 20 * 2048]] = 4.0
    running = Running(LMHead(torch.empty(V, 1)), torch.empty(2, 0).long(), 2, False, True, None)
    running.block(slice(0, 2))(slice(0, V), raw)
    best = present(running.scanned().best)
    assert best.id.tolist() == [5, 90_000]
    assert best.u.tolist() == [[3.0, 2.0], [4.0, 4.0]]
