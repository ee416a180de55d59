"""Statistics of transfer from teachers to students, with the base seed as the unit."""

from ...runtime.intervals import Estimate
from .bootstrap import Bootstrap, paired_bootstrap
from .curves import CurvePoint, SafeWindow, curve, matched_capability, safe_window
from .detection import auroc, threshold_at, true_positives
from .hypothesis_tests import holm, t_test
from .readings import Checkpoint, Reading, Student
from .transfer import SeedPoint, Transfer, transfer
from .validity import Gate, Validity, at_least, at_most

__all__ = [
    "Bootstrap",
    "Checkpoint",
    "CurvePoint",
    "Estimate",
    "Gate",
    "Reading",
    "SafeWindow",
    "SeedPoint",
    "Student",
    "Transfer",
    "Validity",
    "at_least",
    "at_most",
    "auroc",
    "curve",
    "holm",
    "matched_capability",
    "paired_bootstrap",
    "safe_window",
    "t_test",
    "threshold_at",
    "transfer",
    "true_positives",
]
