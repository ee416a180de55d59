"""Strategies for distilling an untrusted teacher; `distill` applies them in order."""

from .annealing import TAID, ReferenceKL
from .audit_loop import AuditGate, FilterAndDistill
from .baselines import OffModelSFT, Undefended
from .distil import Distilled, distill
from .dpo import PreferencePairs
from .filters import ExampleFilter, TokenSelector
from .lessons import PoolPrompt, TrainingExample
from .logit_jam import LogitJam
from .pools import (
    AuditabilityPreservingPool,
    CognitiveSlack,
    DataBudget,
    DomainSampler,
    MisalignmentTargetedPool,
    ShownPool,
)
from .reasoning import AnswerOnly, EmptyReasoning, StudentReasoning
from .rewrite import InoculationPrompt, OutputTransform, StyleSFT
from .shift import ShiftDistill
from .strategy import DistillSetup, RunState, Strategy, Training

__all__ = [
    "TAID",
    "AnswerOnly",
    "AuditGate",
    "AuditabilityPreservingPool",
    "CognitiveSlack",
    "DataBudget",
    "DistillSetup",
    "Distilled",
    "DomainSampler",
    "EmptyReasoning",
    "ExampleFilter",
    "FilterAndDistill",
    "InoculationPrompt",
    "LogitJam",
    "MisalignmentTargetedPool",
    "OffModelSFT",
    "OutputTransform",
    "PoolPrompt",
    "PreferencePairs",
    "ReferenceKL",
    "RunState",
    "ShiftDistill",
    "ShownPool",
    "Strategy",
    "StudentReasoning",
    "StyleSFT",
    "TokenSelector",
    "Training",
    "TrainingExample",
    "Undefended",
    "distill",
]
