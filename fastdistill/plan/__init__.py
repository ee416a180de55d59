"""`plan`: the memory of a training run from config.json alone, and settings that fit a card."""

from .parts import Memory, Part, Phase, Plan, Proposal, Settings
from .planning import plan_memory
from .printing import print_plan

__all__ = [
    "Memory",
    "Part",
    "Phase",
    "Plan",
    "Proposal",
    "Settings",
    "plan_memory",
    "print_plan",
]
