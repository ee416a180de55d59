"""Estimates the memory of a training run from config.json, and proposes settings that fit."""

from .planning import plan_memory
from .printing import print_plan
from .types import Memory, Part, Phase, Plan, Proposal, Settings

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
