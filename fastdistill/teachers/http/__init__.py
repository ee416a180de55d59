"""Teachers over HTTP: a client for vLLM-compatible servers, and a small server."""

from ...hf.resolve import is_url
from .client import ServedTeacher
from .connection import NoAnswer
from .response_checks import WrongAnswer
from .server import make_app, serve

__all__ = ["NoAnswer", "ServedTeacher", "WrongAnswer", "is_url", "make_app", "serve"]
