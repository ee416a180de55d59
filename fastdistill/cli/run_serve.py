"""`fastdistill serve`."""

from __future__ import annotations

import sys
from typing import Any

from ..served import serve
from ..teacher import load_teacher
from .opening import device, quiet
from .printing import say
from .verbs import Serve


def run(own: Serve, more: dict[str, Any]) -> dict[str, Any]:
    quiet()
    teacher = load_teacher(
        own.teacher, quant=own.teacher_quant, compute=own.teacher_compute, device=device()
    )
    said = {}

    def ready(url: str) -> None:
        said["url"] = url
        say(f"{own.teacher} answers at {url} until Ctrl-C", file=sys.stderr, flush=True)

    serve(
        teacher, host=own.host, port=own.port, token=own.token, max_k=own.max_k,
        max_tokens=own.max_tokens, name=own.name, ready=ready,
    )  # fmt: skip
    return said


def tell(found: dict[str, Any]) -> None:
    say(f"{found['url']} is closed")
