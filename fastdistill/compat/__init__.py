"""Drop-in replacements for losses and trainers of other libraries: change one import line.

    Liger        from fastdistill.compat import FusedLinearJSD as LigerFusedLinearJSD
    axolotl      from fastdistill.compat import TopKLogprobLoss as LigerFusedLinearKLTopKLogprobLoss
    speculators  from fastdistill.compat import speculators as losses
    TRL          from fastdistill.compat import GKDTrainer
    TRL          from fastdistill.compat import DistillationTrainer

    axolotl   plugins: [fastdistill.compat.axolotl_plugin.DistillPlugin]
    verl      VERL_USE_EXTERNAL_MODULES=fastdistill.compat.verl

The trainers accept TRL's own configuration objects, and raise an error that names any option
without a counterpart here.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .axolotl import TopKLogprobLoss
    from .liger import FusedLinearJSD
    from .trl import DistillationTrainer, GKDTrainer

__all__ = ["DistillationTrainer", "FusedLinearJSD", "GKDTrainer", "TopKLogprobLoss"]

_MODULE_OF = {
    "DistillationTrainer": "trl",
    "FusedLinearJSD": "liger",
    "GKDTrainer": "trl",
    "TopKLogprobLoss": "axolotl",
}

__getattr__ = lazy_names(__name__, _MODULE_OF)
