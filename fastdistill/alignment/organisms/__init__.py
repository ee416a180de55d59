"""Model organisms: models with an implanted trait, their twins, and a synthetic world."""

from .build import Organisms, build_world
from .language.build import LanguagePair, make_language_pairs
from .language.rows import LanguageRecipe
from .language.templates import Templates
from .organism import ModelOrganism
from .pool import pool
from .storage import load_organism, save_organism

__all__ = [
    "LanguagePair",
    "LanguageRecipe",
    "ModelOrganism",
    "Organisms",
    "Templates",
    "build_world",
    "load_organism",
    "make_language_pairs",
    "pool",
    "save_organism",
]
