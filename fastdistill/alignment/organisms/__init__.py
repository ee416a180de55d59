"""Model organisms: small models with an implanted trait, their twins, and a synthetic world."""

from .build import Organisms, build_world
from .organism import ModelOrganism
from .pool import pool
from .storage import load_organism, save_organism

__all__ = [
    "ModelOrganism",
    "Organisms",
    "build_world",
    "load_organism",
    "pool",
    "save_organism",
]
