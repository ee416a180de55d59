"""A teacher's answers on disk: built once, verified, and read where batches are made."""

from .cache import TeacherCache
from .manifest import CacheError

__all__ = ["CacheError", "TeacherCache"]
