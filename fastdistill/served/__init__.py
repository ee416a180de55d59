"""Teachers over HTTP: a client for vLLM-compatible servers, and a small server."""

from ..hf.resolve import is_url
from .client import ServedTeacher
from .connection import NoAnswer
from .server import make_app, serve
from .verdict import WrongAnswer

__all__ = ["NoAnswer", "ServedTeacher", "WrongAnswer", "is_url", "make_app", "serve"]
