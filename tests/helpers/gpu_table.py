"""Every check that runs on a CUDA device, in one list."""

from helpers.gpu_checks import CHECKS as LOSSES
from helpers.gpu_plan_checks import CHECKS as PLANS
from helpers.gpu_quant_checks import CHECKS as QUANTISED
from helpers.gpu_training_checks import CHECKS as TRAINING

CHECKS = [*LOSSES, *QUANTISED, *TRAINING, *PLANS]
