"""A socket with a deadline and a byte limit for each exchange with a server.

The timeout of a plain socket applies to each piece: a server that sends a byte now and then would
hold the client forever.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from typing import Any

_PIECE = 1 << 14  # bytes sent between checks of the deadline
_FOREVER = 1e8  # seconds, three years; sockets accept only a few times that
_CONNECT = 15.0  # seconds at most until a server accepts a connection


class AnswerTooLarge(Exception):
    """The server sent more bytes than an answer to this request can have."""


class Unreachable(OSError):
    """No connection could be made; its cause is the system's error."""


class Deadline:
    """A point in time, `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + min(seconds, _FOREVER)

    def left(self) -> float:
        """Return the remaining seconds; raise TimeoutError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class BoundedSocket:
    """The part of a socket that http.client uses. Call `begin` before each exchange.

    Args:
        sock: a connected socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline, self._limit = Deadline(0.0), 0

    def begin(self, deadline: Deadline, limit: int) -> None:
        """Start an exchange that ends at `deadline` and receives at most `limit` bytes."""
        self._deadline, self._limit = deadline, limit

    def sendall(self, data: Any) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            self._sock.settimeout(self._deadline.left())
            self._sock.sendall(view[start : start + _PIECE])

    def receive(self, stream: socket.SocketIO, buffer: Any) -> int | None:
        """Read from `stream` of this socket into `buffer`; return the number of bytes."""
        self._sock.settimeout(self._deadline.left())
        count = stream.readinto(buffer)
        self._limit -= count or 0
        if self._limit < 0:
            raise AnswerTooLarge
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self, self._sock.makefile(mode, buffering=0)))  # type: ignore[call-overload]

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)

    def close(self) -> None:
        self._sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, sock: BoundedSocket, stream: socket.SocketIO) -> None:
        self._bounded, self._stream = sock, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return self._bounded.receive(self._stream, buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


def connect(host: str, port: int, secure: bool, deadline: Deadline) -> BoundedSocket:
    """Return a connected socket.

    Raises:
        Unreachable: no server answers, or it does not speak TLS. ssl.SSLCertVerificationError: the
        certificate is not trusted.
    """
    within = Deadline(min(deadline.left(), _CONNECT))
    failure: OSError = OSError("no address")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable from error
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(within.left())
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                sock.settimeout(deadline.left())
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except ssl.SSLCertVerificationError:
            sock.close()
            raise
        except OSError as error:
            sock.close()
            failure = error
        else:
            return BoundedSocket(sock)
    raise Unreachable from failure
