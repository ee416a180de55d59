"""fastdistill serve: serves one Teacher over HTTP to several machines."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...runtime import backend, checks
from ...runtime.optional import require
from ...runtime.printable import printable
from ...runtime.version import __version__
from ..identity import identity_of, tokenizer_identity
from ..local import Teacher
from .connection import check_token
from .loopback import is_loopback
from .server_info import ServerInfo

MAX_K, MAX_TOKENS = 256, 65536
_EXTRA = "'fastdistill[serve]'"


def make_app(
    teacher: Teacher,
    *,
    token: str | None = None,
    max_k: int = MAX_K,
    max_tokens: int = MAX_TOKENS,
    name: str | None = None,
) -> Any:
    """Return the ASGI application, to run it in another server; arguments as in `serve`.

    POST /v1/completions, GET /v1/models and GET /health have vLLM's form, as far as prompt_logprobs
    need it; ServedTeacher uses POST /v1/topk (wire_format.py).
    """
    checks.integer("max_k", max_k, 1)
    checks.integer("max_tokens", max_tokens, 1)
    check_token(token)
    if not isinstance(teacher, Teacher):
        raise TypeError(f"teacher: expected a Teacher, got {type(teacher).__name__}")
    require("starlette", "serve", _EXTRA)
    from .app import Application

    identity = identity_of(teacher)
    path = Path(str(identity["name"]))
    if path.is_absolute() or path.exists():  # of a folder, only the last part is public
        identity["name"] = path.resolve().name
    server_info = ServerInfo(
        version=__version__,
        honours_temperature=True,
        vocab_size=teacher.vocab_size,
        max_k=min(max_k, teacher.vocab_size),
        max_tokens=max_tokens,
        tokenizer_sha256=tokenizer_identity(teacher.tokenizer)[0],
        identity=identity,
    )
    name = str(identity["name"]) if name is None else name
    return Application(teacher, server_info, name=name, token=token).starlette


def serve(
    teacher: Teacher,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_k: int = MAX_K,
    max_tokens: int = MAX_TOKENS,
    name: str | None = None,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serve a teacher until Ctrl-C.

    Args:
        teacher: used by one thread; waiting requests are batched.
        host: the address to listen on; one that other machines reach needs a token.
        port: 0 chooses a free one.
        token: required from clients, except at /health. None is the environment's
            FASTDISTILL_TOKEN, or none. It is sent unencrypted: on a shared network, use a tunnel or
            a TLS proxy.
        max_k: the largest k of a request.
        max_tokens: in one request. At most four times as many are queued; further requests get
            status 503.
        name: of the model, for clients. None is the model's own.
        ready: called with the URL when the server accepts connections.

    Raises:
        ValueError: an address of other than loopback without a token. ImportError: starlette or
        uvicorn is missing. OSError: the port is in use, or the address is not this machine's.
    """
    token = backend.served_token() if token is None else token
    if not token and not is_loopback(host):
        expected = f"one when host is not loopback (host={host!r})"
        hint = "pass token=, set FASTDISTILL_TOKEN, or leave host at 127.0.0.1"
        checks.fail("token", expected, "none", hint)
    app = make_app(teacher, token=token or None, max_k=max_k, max_tokens=max_tokens, name=name)
    with listen(host, port) as listening:
        server = make_server(app)
        if ready is not None:
            ready(url_of(listening))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; connections are queued until a server accepts them."""
    checks.integer("port", port, 0, 65535)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        message = f"host: expected an address of this machine, got {host!r} ({printable(error)})"
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            message = (
                f"port: expected a free one on {host}, got {port} ({error.strerror or error}). "
                "Choose another with port=, or stop what listens there"
            )
        raise OSError(message) from None


def make_server(app: Any) -> Any:
    """Return a uvicorn server for `app` that logs warnings only."""
    uvicorn = require("uvicorn", "serve", _EXTRA)
    from .http_protocol import BoundedProtocol

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=10,
            server_header=False,
        )
    )


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
