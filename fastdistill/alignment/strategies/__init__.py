"""Strategies for distilling an untrusted teacher; `distill` applies them in order."""

from .audit_loop import AuditGate, FilterAndDistill
from .baselines import OffModelSFT, Undefended, Untrained
from .distil import Distilled, distill
from .filters import DivergenceMask, ExampleFilter
from .lessons import PoolPrompt, TrainingExample
from .pools import DataBudget, MisalignmentTargetedPool, ShownPool
from .reasoning import AnswerOnly, EmptyReasoning
from .rewrite import InoculationPrompt, StyleSFT
from .shift import ShiftDistill
from .strategy import DistillSetup, RunState, Strategy, Training

__all__ = [
    "AnswerOnly",
    "AuditGate",
    "DataBudget",
    "DistillSetup",
    "Distilled",
    "DivergenceMask",
    "EmptyReasoning",
    "ExampleFilter",
    "FilterAndDistill",
    "InoculationPrompt",
    "MisalignmentTargetedPool",
    "OffModelSFT",
    "PoolPrompt",
    "RunState",
    "ShiftDistill",
    "ShownPool",
    "Strategy",
    "StyleSFT",
    "Training",
    "TrainingExample",
    "Undefended",
    "Untrained",
    "distill",
]
