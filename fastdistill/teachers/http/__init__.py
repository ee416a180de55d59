"""Teachers over HTTP: a client for vLLM-compatible servers, and a small server.

The server is imported on first use, because it needs transformers.
"""

from typing import TYPE_CHECKING

from ...hf.source import is_url
from ...runtime.lazy import lazy_names
from .client import ServedTeacher
from .connection import NoAnswer
from .response_checks import WrongAnswer
from .sampler import OpenAISampler

if TYPE_CHECKING:
    from .server import make_app, serve

__all__ = [
    "NoAnswer",
    "OpenAISampler",
    "ServedTeacher",
    "WrongAnswer",
    "is_url",
    "make_app",
    "serve",
]

__getattr__ = lazy_names(__name__, {"make_app": "server", "serve": "server"}, extra="serve")
