"""Every check that runs on a CUDA device, by group."""

from helpers.gpu_checks import CHECKS as LOSSES
from helpers.gpu_plan_checks import CHECKS as PLANS
from helpers.gpu_quant_checks import CHECKS as QUANTIZED
from helpers.gpu_training_checks import CHECKS as TRAINING

GROUPS = {"losses": LOSSES, "quantized": QUANTIZED, "training": TRAINING, "plans": PLANS}
CHECKS = [check for group in GROUPS.values() for check in group]
