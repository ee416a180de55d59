"""Middleware that rejects requests of web pages, and requests with two lengths.

Without a token the server answers this machine only. This includes its browsers: a web page whose
domain resolves to 127.0.0.1 (DNS rebinding) could send requests. Host and Origin reveal it.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .loopback import is_loopback
from .requests import RequestError


class Guard:
    """ASGI middleware.

    Args:
        app: the ASGI application.
        only_loopback: reject all host names but the loopback names, except for /health.
    """

    def __init__(self, app: Any, only_loopback: bool) -> None:
        self._app, self._only_loopback = app, only_loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request_error = self._check(scope) if scope["type"] == "http" else None
        if request_error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(request_error)(scope, receive, send)

    def _check(self, scope: Any) -> RequestError | None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            message = "Content-Length: expected none with Transfer-Encoding, got both"
            return RequestError(400, message, close=True)
        if not self._only_loopback or scope["path"] == "/health":
            return None
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_loopback(_hostname(f"//{hosts[0]}")):
            message = "Host: expected this machine's 127.0.0.1, ::1 or localhost, got another one"
            return RequestError(421, f"{message} ({', '.join(hosts)}). {_REMEDY}", "Host")
        for origin in headers.getlist("origin"):
            if not is_loopback(_hostname(origin)):
                message = f"Origin: expected a page of this machine, got {origin}. {_REMEDY}"
                return RequestError(403, message, "Origin")
        return None


def error_response(error: RequestError) -> JSONResponse:
    return JSONResponse(error.as_json(), error.status, error.headers)


_REMEDY = "A server that was started with a token accepts every name"


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
