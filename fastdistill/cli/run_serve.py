"""`fastdistill serve`."""

from __future__ import annotations

import sys
from typing import Any

from ..hf.source import model_source
from ..runtime.optional import check_installed
from ..teachers.http import serve
from ..teachers.local import load_teacher
from .loaders import device
from .printing import say
from .verbs import Serve


def run(options: Serve, extra: dict[str, Any]) -> dict[str, Any]:
    check_installed("fastdistill serve", "serve", "starlette", "uvicorn")
    hint = "serve the model that gave the answers; train reads a URL or a cache itself"
    model_source("teacher", options.teacher, hint)
    teacher = load_teacher(
        options.teacher,
        quant=options.teacher_quant,
        compute=options.teacher_compute,
        device=device(),
    )
    address: dict[str, str] = {}

    def ready(url: str) -> None:
        address["url"] = url
        say(f"{options.teacher} is served at {url} until Ctrl-C", file=sys.stderr, flush=True)

    serve(
        teacher,
        host=options.host,
        port=options.port,
        token=options.token,
        max_k=options.max_k,
        max_tokens=options.max_tokens,
        name=options.name,
        ready=ready,
    )
    return address


def print_result(result: dict[str, Any]) -> None:
    say(f"{result['url']} was closed")
