"""The scores of a block: the kernel against PyTorch in fp64, on rows of each kind."""

import pytest
import torch

from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.head import LMHead
from fastdistill.kernels.row_scores import RowScores
from fastdistill.kernels.token_loss import TeacherTopK
from helpers.present import present
from helpers.tolerances import assert_close


def scores_of(impl: str, K: int, V: int, with_label: bool, T: float, z_first: float) -> RowScores:
    """Of five rows of logits, which are the hidden states; the first logit of row 2 is given."""
    g = torch.Generator().manual_seed(2)
    z = 3 * torch.randn(5, V, generator=g, dtype=torch.float64)
    z[2, 0] = z_first
    head = LMHead(torch.eye(V, dtype=torch.float64), temperature=T)
    teacher = None
    if K:
        ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(5)])
        ids[3, K // 2 :] = -1
        lp = torch.randn(5, K, generator=g, dtype=torch.float64).log_softmax(-1) - 0.2
        lp = lp.masked_fill(ids < 0, -708.0)
        teacher = TeacherTopK(ids, lp, torch.log1p(-lp.exp().sum(-1).clamp(max=0.999)))
    label = None
    slots = torch.empty(5, 0, dtype=torch.int64) if teacher is None else teacher.ids
    if with_label:
        # The most probable token, one of the teacher's ids, none, and two others.
        label = torch.stack([z[0].argmax(), slots[1, 0] if K else z[1].argmin()])
        label = torch.cat([label, torch.tensor([-1, 1, V - 1])])
        slots = torch.cat([slots, label[:, None]], -1)
    u_label = None if label is None else z.gather(1, label.clamp(min=0)[:, None])[:, 0]
    scanned = get_backend("torch").scan(
        head, z, slots, moments=2, base=True, best=True, label_u_n=u_label
    )
    return get_backend(impl).token_scores(head, slots, scanned, teacher, label)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("with_label", [False, True])
@pytest.mark.parametrize(("K", "V"), [(0, 9), (1, 9), (7, 31), (600, 700), (9, 9)])
def test_rows_against_pytorch(K, V, with_label, T):
    expected = scores_of("torch", K, V, with_label, T, 20.0)
    actual = scores_of("triton", K, V, with_label, T, 20.0)
    for name, a, b in zip(RowScores._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None and b.is_floating_point():
            assert_close(a, b, 1e-9, name)
        elif b is not None:
            assert present(a).tolist() == b.tolist(), name


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy in Triton's interpreter
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_logit_that_is_not_finite_stays_in_its_row(impl):
    scores = scores_of(impl, 7, 31, True, 1.0, torch.nan)
    for name in ("lse", "entropy", "varentropy", "forward_kl", "hellinger", "acceptance_rate"):
        finite = getattr(scores, name).isfinite().tolist()
        assert finite == [True, True, False, True, True], name
