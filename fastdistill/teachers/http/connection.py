"""HTTP to one server: persistent connections, a deadline for each request, and retries.

A request is retried after 0.5 s, 1 s, 2 s, … up to 30 s if it got no answer (refused, dropped, too
slow), 429 or 5xx. Other statuses are final. Before the first answer, an address where no server
listens is retried for a few seconds only, since it is probably wrong.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import ssl
import threading
import time
import weakref
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

from ...runtime import checks
from ...runtime.json_text import parse_json
from ...runtime.printable import LIMIT, printable
from .bounded_socket import AnswerTooLarge, Deadline, Unreachable, connect

logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
FIRST_CONTACT = 3.0  # seconds of trying to reach a server that never answered
_MAX_RETRY_AFTER = 600.0  # seconds that all Retry-After of one request may add
_WARN_AFTER = 3.0  # seconds of retries before a warning
_CHUNK = 1 << 20
LARGEST = 1 << 24  # bytes of an answer, unless the request allows more
_rng = random.Random()  # separate, so that a run's random stream is not consumed


class NoAnswer(ConnectionError):
    """The server did not answer, after all retries."""


class Refusal(ValueError):
    """The server rejected a request with this status and message."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(f"{url}: the server refused the request with status {status}: {message}")
        self.status, self.message = status, message


class Reply(NamedTuple):
    status: int
    headers: Any
    body: bytes


class Connection:
    """Sends requests to one server, thread-safe; a request may be sent more than once.

    Args:
        url: http://host:port or https://…, with or without /v1 at the end.
        token: sent as a bearer token.
        timeout: seconds for a request, from connecting to its answer's last byte.
        retries: how often a request is sent again.
    """

    def __init__(self, url: str, *, token: str | None, timeout: float, retries: int) -> None:
        parts = _split_url(url)
        check_token(token)
        checks.positive("timeout", timeout)
        checks.integer("retries", retries, 0)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._secure = parts.scheme == "https"
        self._host = str(parts.hostname)
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = urlsplit(self.url).path.rstrip("/")
        self._token, self.timeout, self.retries = token, timeout, retries
        self._reached = False  # whether it ever answered
        self._open()

    def _open(self) -> None:
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._warned = False  # that the server does not answer
        weakref.finalize(self, _close, self._idle)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_idle", "_busy", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def close(self) -> None:
        """Close idle connections; the next request opens new ones."""
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
        limit: int = LARGEST,
    ) -> Reply:
        """Return the server's answer with status 200: to a POST of `body` as JSON, or to a GET.

        Args:
            stop: ends the wait of this thread.
            limit: largest number of bytes of an answer, including its header.

        Raises:
            NoAnswer: no answer, one beyond `limit`, or `stop` was set. Refusal: a status that is
            not retried. ValueError: another token.
        """
        payload = None if body is None else json.dumps(body).encode()
        stop, started = stop or threading.Event(), time.monotonic()
        # Seconds that this request may wait between its attempts.
        patience = sum(map(_usual_wait, range(self.retries))) * 1.25
        patience += min(_MAX_RETRY_AFTER, self.timeout * (self.retries + 1))
        for attempt in range(self.retries + 1):
            requested, give_up = 0.0, attempt == self.retries
            try:
                reply = self._once(path, payload, stop, limit)
            except ssl.SSLCertVerificationError as error:
                raise NoAnswer(f"{self.url}: its certificate is not trusted ({error})") from None
            except AnswerTooLarge:
                raise NoAnswer(
                    f"{self.url}: expected at most {limit:,} bytes in answer to {path}, got more"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                failure = _describe(error, self.timeout)
                unknown = isinstance(error, Unreachable) and not self._reached
                give_up |= unknown and time.monotonic() - started > FIRST_CONTACT
            else:
                self._reached = True
                if reply.status == 200:
                    self._warned = False
                    return reply
                message = message_of(reply.body)
                if reply.status == 401:
                    expected = f"the one that {self.url} was started with"
                    hint = "pass token=, or set FASTDISTILL_TOKEN"
                    checks.fail("token", expected, f"another ({message})", hint)
                if reply.status != 429 and reply.status < 500:
                    raise Refusal(self.url, reply.status, message)
                failure = f"status {reply.status}: {message}"
                requested = _retry_after(reply.headers.get("Retry-After")) or 0.0
            wait = _usual_wait(attempt) * _rng.uniform(0.75, 1.25)
            wait = min(max(wait, requested), patience)
            patience -= wait
            if give_up or not wait:
                break
            if time.monotonic() + wait - started > _WARN_AFTER and not self._warned:
                self._warned = True
                message = "%s does not answer (%s); retrying up to %d times more"
                logger.warning(message, self.url, failure, self.retries - attempt)
            if stop.wait(wait):
                raise NoAnswer(f"{self.url}: stopped, since another request failed")
        advice = "An address that never answered is retried for a few seconds only"
        if self._reached:
            advice = "Raise timeout or retries, or lower tokens_per_request for faster answers"
        raise NoAnswer(
            f"{self.url}: expected an answer to {path}, got none in {attempt + 1} attempts "
            f"over {time.monotonic() - started:.1f} s; the last: {failure}. Is the server running "
            f"there, and has it finished loading? {advice}"
        )

    def _once(self, path: str, payload: bytes | None, stop: threading.Event, limit: int) -> Reply:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                return self._exchange(connection, path, payload, limit)
            except (ConnectionError, http.client.BadStatusLine):
                # The server may have closed the idle connection: try a new one.
                if stop.is_set():
                    raise
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return self._exchange(kind(self._host, self._port), path, payload, limit)

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, payload: bytes | None, limit: int
    ) -> Reply:
        headers = {"Accept": "*/*"}
        if payload is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        deadline = Deadline(self.timeout)
        with self._lock:
            self._busy.add(connection)
        reusable = False
        try:
            method = "GET" if payload is None else "POST"
            sock: Any = connection.sock
            if sock is None:
                sock = connect(self._host, self._port, self._secure, deadline)
                connection.sock = sock
            sock.begin(deadline, limit)
            connection.request(method, self._prefix + path, payload, headers)
            response = connection.getresponse()
            body = _read(response)
            reusable = not response.will_close
            return Reply(response.status, response.headers, body)
        finally:
            with self._lock:
                self._busy.discard(connection)
                if reusable:
                    self._idle.append(connection)
            if not reusable:
                connection.close()


def _split_url(url: Any) -> SplitResult:
    """Return the parts of a server's URL; raise ValueError if it is invalid."""
    expected, got = "http://host:port or https://host:port", printable(repr(url), 120)
    try:
        text = url if isinstance(url, str) else ""
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").encode("idna")
    except ValueError as error:  # an invalid port, bracket or host name
        checks.fail("url", expected, got, printable(error))
    if parts.username or parts.password:
        checks.fail("url", "no name or password in it", "one", "pass token=")
    # http.client sends the path as it is written.
    sendable = text == text.strip() and all("!" <= letter <= "~" for letter in parts.path)
    named = parts.scheme in ("http", "https") and host and not host.count(b" ")
    if not named or not sendable or port == 0 or parts.query or parts.fragment:
        checks.fail("url", expected, got)
    return parts


def _usual_wait(attempt: int) -> float:
    return float(min(FIRST_WAIT * 2 ** min(attempt, 30), LONGEST_WAIT))


def _read(response: http.client.HTTPResponse) -> bytes:
    with response:  # closing it makes the connection reusable
        body = b"".join(iter(partial(response.read1, _CHUNK), b""))
    if response.length:  # announced but not sent
        raise http.client.IncompleteRead(body, response.length)
    return body


def _close(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _describe(error: Exception, timeout: float) -> str:
    if isinstance(error, Unreachable):
        cause = error.__cause__
        return f"{type(cause).__name__}: {printable(cause)}"
    if isinstance(error, TimeoutError):
        return f"no whole answer within {timeout:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of an answer"
    return f"{type(error).__name__}: {printable(error)}"


def check_token(token: str | None) -> None:
    """Raise ValueError for a token that is invalid in a header, without printing it."""
    if token is not None and not isinstance(token, str):
        checks.fail("token", "a text", type(token).__name__)
    if token is not None and not (token.isascii() and token.isprintable()):
        checks.fail("token", "printable ASCII characters", "others", "is there a line end in it?")


def message_of(body: bytes) -> str:
    """Return the message of an error response, in any server's form, as one printable line."""
    text = body.decode(errors="replace")
    value: Any = None
    with suppress(ValueError):
        value = parse_json(text, "")
    for name in ("error", "message", "detail"):
        if isinstance(value, dict):
            value = value.get(name, value)
    words = (value if isinstance(value, str) else text).split()
    return printable(" ".join(words), LIMIT - 1) or "no message"


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header; None if it is invalid."""
    if value is None:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
