"""Teacher caches: top-k answers on disk, built once and read by DataLoader workers."""

from .cache import TeacherCache
from .manifest import CacheError

__all__ = ["CacheError", "TeacherCache"]
