"""Statistics of transfer from teachers to students, with the base seed as the unit."""

from ..intervals import Estimate
from .curves import CurvePoint, SafeWindow, curve, matched_capability, safe_window
from .detection import auroc, threshold_at, true_positives
from .readings import Checkpoint, Reading, Student
from .resampling import hierarchical_bootstrap, paired_bootstrap
from .testing import Equivalence, equivalence, holm, minimum_detectable_effect, t_test
from .transfer import SeedPoint, Transfer, transfer
from .validity import Gate, Validity

__all__ = [
    "Checkpoint",
    "CurvePoint",
    "Equivalence",
    "Estimate",
    "Gate",
    "Reading",
    "SafeWindow",
    "SeedPoint",
    "Student",
    "Transfer",
    "Validity",
    "auroc",
    "curve",
    "equivalence",
    "hierarchical_bootstrap",
    "holm",
    "matched_capability",
    "minimum_detectable_effect",
    "paired_bootstrap",
    "safe_window",
    "t_test",
    "threshold_at",
    "transfer",
    "true_positives",
]
