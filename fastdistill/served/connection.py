"""HTTP to one server: connections kept alive, a deadline for each request, and patience.

Asked again, after 0.5 s, 1 s, 2 s, … up to 30 s: what got no answer (refused, dropped, too slow),
429 and 5xx. Any other status is the server's word and ends the asking.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import ssl
import threading
import time
import weakref
from contextlib import suppress
from email.utils import parsedate_to_datetime
from textwrap import shorten
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .. import checks

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
_LONGEST_ASKED = 600.0  # of a Retry-After
_SILENT = 3.0  # seconds of retrying before it is said
_CHUNK = 1 << 20
_own_chance = random.Random()  # a run's random stream must not move


class NoAnswer(ConnectionError):
    """The server gave none, however often it was asked."""


class Refusal(ValueError):
    """The server's own word against a request: its status, and its message in `said`."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(f"{url}: the server refused the request with status {status}: {said}")
        self.status, self.said = status, said


class Reply(NamedTuple):
    status: int
    headers: Any
    body: bytes


class Connection:
    """Asks one server, from any number of threads; what it sends may be sent twice.

    Args:
        url: http://host:port or https://…, with or without /v1 behind it.
        token: sent as a bearer token.
        timeout: seconds for a request, from connecting to its answer's last byte.
        retries: how often a request is sent again.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float, retries: int) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            checks.fail("url", "http://host:port or https://host:port", repr(url))
        if parts.username or parts.password:
            checks.fail("url", "no name or password in it", "one", "pass token=")
        check_token(token)
        checks.positive("timeout", timeout)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            checks.fail("retries", "an integer from 0 on", repr(retries))
        self.url = url.rstrip("/").removesuffix("/v1")
        self._secure = parts.scheme == "https"
        self._host, self._port = str(parts.hostname), parts.port
        self._prefix = urlsplit(self.url).path.rstrip("/")
        self._token, self.timeout, self.retries = token, timeout, retries
        self._open()

    def _open(self) -> None:
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._told = False  # that the server does not answer
        weakref.finalize(self, _close, self._idle)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_idle", "_busy", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def close(self) -> None:
        """Close what is open; the next request opens it again."""
        with self._lock:
            _close(self._idle)

    def interrupt(self) -> None:
        """Make requests in other threads fail now."""
        with self._lock:
            for connection in self._busy:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(2)

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        stop: threading.Event | None = None,
    ) -> Reply:
        """The server's answer, status 200: to a GET, or with a body to a POST of it as JSON.

        Raises:
            NoAnswer: none came, or `stop` was set while waiting. Refusal: a status that asking
            again does not change.
        """
        payload = None if body is None else json.dumps(body).encode()
        stop, began = stop or threading.Event(), time.monotonic()
        for attempt in range(self.retries + 1):
            asked: float | None = None
            try:
                reply = self._once(path, payload, stop)
            except ssl.SSLCertVerificationError as error:
                raise NoAnswer(f"{self.url}: its certificate is not trusted ({error})") from None
            except (OSError, http.client.HTTPException) as error:
                failure = _in_words(error, self.timeout)
            else:
                if reply.status == 200:
                    self._told = False
                    return reply
                said = message_of(reply.body)
                if reply.status != 429 and reply.status < 500:
                    raise Refusal(self.url, reply.status, said)
                failure = f"status {reply.status}: {said}"
                asked = _retry_after(reply.headers.get("Retry-After"))
            if attempt == self.retries:
                break
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * _own_chance.uniform(0.75, 1.25)
            wait = max(wait, min(asked or 0.0, _LONGEST_ASKED))
            if time.monotonic() + wait - began > _SILENT and not self._told:
                self._told = True
                logger.warning(
                    "%s does not answer (%s); asking again, up to %d times more",
                    self.url, failure, self.retries - attempt,
                )  # fmt: skip
            if stop.wait(wait):
                raise NoAnswer(f"{self.url}: stopped asking, since another request failed")
        raise NoAnswer(
            f"{self.url}: expected an answer to {path}, got none in {self.retries + 1} attempts "
            f"over {time.monotonic() - began:.1f} s; the last: {failure}. Is the server running "
            "there, and has it finished loading? A larger timeout and more retries wait "
            "longer; fewer tokens_per_request are answered sooner"
        )

    def _once(self, path: str, payload: bytes | None, stop: threading.Event) -> Reply:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._exchange(connection, path, payload)
            except (ConnectionError, http.client.BadStatusLine):
                # A server may have closed it in the meantime, which says nothing of its health.
                if stop.is_set():
                    raise
        return self._exchange(self._new(), path, payload)

    def _new(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=self.timeout, context=context
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=self.timeout)

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, payload: bytes | None
    ) -> Reply:
        headers = {"Accept": "*/*"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        deadline = time.monotonic() + self.timeout
        with self._lock:
            self._busy.add(connection)
        whole = False
        try:
            method = "GET" if payload is None else "POST"
            if connection.sock is not None:
                connection.sock.settimeout(self.timeout)
            connection.request(method, self._prefix + path, payload, headers)
            response = connection.getresponse()
            body = _read(response, connection.sock, deadline)
            whole = not response.will_close
            return Reply(response.status, response.headers, body)
        finally:
            with self._lock:
                self._busy.discard(connection)
                if whole:
                    self._idle.append(connection)
            if not whole:
                connection.close()


def _read(response: http.client.HTTPResponse, sock: Any, deadline: float) -> bytes:
    """The body: a socket's timeout is for each piece, and a server may send one byte at a time."""
    pieces = []
    with response:  # a connection takes its next request when this is closed
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if sock is not None:
                sock.settimeout(left)
            piece = response.read1(_CHUNK)
            if not piece:
                break
            pieces.append(piece)
    body = b"".join(pieces)
    if response.length:  # promised, and not sent
        raise http.client.IncompleteRead(body, response.length)
    return body


def _close(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _in_words(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no whole answer within {timeout:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of an answer"
    return f"{type(error).__name__}: {error}"


def check_token(token: str | None) -> None:
    """Raise ValueError, without showing it, for a token that no header can hold."""
    if token is not None and not (token.isascii() and token.isprintable()):
        checks.fail("token", "printable ASCII characters", "others", "is there a line end in it?")


def message_of(body: bytes) -> str:
    """The message in an error's body, in any of the forms that servers use, at most 300 letters."""
    text = body.decode(errors="replace")
    found: Any = None
    with suppress(ValueError):
        found = json.loads(text)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict):
            found = found.get(name, found)
    return shorten(str(found if isinstance(found, str) else text), 300) or "no message"


def _retry_after(value: str | None) -> float | None:
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
