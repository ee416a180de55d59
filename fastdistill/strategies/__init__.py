"""Ways to distil an untrusted teacher, each a small object; `distil` puts them in a row."""

from .annealing import TAID, ReferenceKL
from .baselines import OffModelSFT, Undefended
from .distil import Distilled, distil
from .filters import ExampleFilter, TokenSelector
from .jamming import LogitJam
from .lessons import Asked, Lesson
from .pairs import PreferencePairs
from .pools import (
    AuditabilityPreservingPool,
    CognitiveSlack,
    DataBudget,
    DomainSampler,
    MisalignmentTargetedPool,
    ShownPool,
)
from .reasoning import AnswerOnly, EmptyReasoning, StudentReasoning
from .rewriting import InoculationPrompt, OutputTransform, StyleSFT
from .rounds import AuditGate, FilterAndDistill
from .shift import ShiftDistill
from .strategy import Run, Scene, Strategy, Training

__all__ = [
    "TAID",
    "AnswerOnly",
    "Asked",
    "AuditGate",
    "AuditabilityPreservingPool",
    "CognitiveSlack",
    "DataBudget",
    "Distilled",
    "DomainSampler",
    "EmptyReasoning",
    "ExampleFilter",
    "FilterAndDistill",
    "InoculationPrompt",
    "Lesson",
    "LogitJam",
    "MisalignmentTargetedPool",
    "OffModelSFT",
    "OutputTransform",
    "PreferencePairs",
    "ReferenceKL",
    "Run",
    "Scene",
    "ShiftDistill",
    "ShownPool",
    "Strategy",
    "StudentReasoning",
    "StyleSFT",
    "TokenSelector",
    "Training",
    "Undefended",
    "distil",
]
