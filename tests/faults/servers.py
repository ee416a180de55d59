"""A server of a teacher behind a relay that misbehaves in some of its exchanges."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

from fastdistill import Teacher
from fastdistill.teachers.http import connection
from fastdistill.teachers.http.server import listen, make_app, make_server, url_of
from helpers.training import peaked

from .attempt import background
from .cases import Case, Repair

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
Misbehave = Callable[[socket.socket, bytes], object]  # (client, the honest answer)


def _send_forever(piece: bytes, first: bytes = b"", pause: float = 0.0) -> Misbehave:
    def send(client: socket.socket, honest: bytes) -> None:
        client.sendall(first)
        while True:
            client.sendall(piece)
            time.sleep(pause)

    return send


def _say(text: bytes) -> Misbehave:
    return lambda client, honest: client.sendall(text)


def _status(line: str, *headers: str, body: str = "{}") -> Misbehave:
    head = "\r\n".join([f"HTTP/1.1 {line}", *headers, f"Content-Length: {len(body)}", "", body])
    return _say(head.encode())


def _drip(client: socket.socket, honest: bytes) -> None:
    for byte in honest:
        client.sendall(bytes([byte]))
        time.sleep(0.05)


def _flip(client: socket.socket, honest: bytes) -> None:
    """Flip the sign bits of the answer's last bytes."""
    client.sendall(honest[:-64] + bytes(byte ^ 0x80 for byte in honest[-64:]))


MISBEHAVIOR: dict[str, Misbehave] = {
    "closes": lambda client, honest: None,
    "resets": lambda client, honest: client.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
    ),
    "says nothing": lambda client, honest: time.sleep(60),
    "header without end": _send_forever(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n", 0.01),
    "header byte by byte": _send_forever(b"a", b"HTTP/1.1 200 OK\r\nX-A: ", 0.05),
    "100 Continue without end": _send_forever(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 0.001),
    "body without end": _send_forever(b"x" * 65536, OK + b"\r\n"),
    "chunks without end": _send_forever(
        b"10000\r\n" + b"x" * 65536 + b"\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n"
    ),
    "byte by byte": _drip,
    "half of the answer": lambda client, honest: client.sendall(honest[: len(honest) // 2]),
    "more than announced": lambda client, honest: client.sendall(honest + b"x" * 100),
    "no HTTP": _say(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "empty answer": _say(OK + b"Content-Length: 0\r\n\r\n"),
    "JSON instead": _status("200 OK"),
    "a web page": _status("200 OK", "Content-Type: text/html", body="<script>alert(1)</script>"),
    "flipped bits": _flip,
    "302 to elsewhere": _status("302 Found", "Location: http://127.0.0.1:9/"),
    "301 to itself": _status("301 Moved Permanently", "Location: /v1/topk"),
    "401": _status("401 Unauthorized"),
    "404": _status("404 Not Found"),
    "429": _status("429 Too Many Requests", "Retry-After: 1"),
    "500": _status("500 Internal Server Error"),
    "503, retry in 10^9 s": _status("503 Service Unavailable", "Retry-After: 1000000000"),
    "invalid lengths": _say(OK + b"Content-Length: -5\r\n\r\n"),
}


def relay(listening: socket.socket, port: int, misbehave: Misbehave, bad: range) -> None:
    """Pass requests to the server; misbehave in those of these numbers, counted from 0."""
    numbers = itertools.count()

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(30)
            request = _request(client)
            honest = _exchange(port, request)
            if next(numbers) in bad:
                misbehave(client, honest)
            else:
                client.sendall(honest)

    while True:
        client, _ = listening.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()


def _request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line.partition(b":") for line in head.split(b"\r\n")]
    length = next((int(v) for name, _, v in lines if name.lower() == b"content-length"), 0)
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


def _exchange(port: int, request: bytes) -> bytes:
    """Return the server's answer, as one that ends its connection."""
    head, _, body = request.partition(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n")[0].split(b" ")
    server = HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"} if body else {}
    server.request(method.decode(), path.decode(), body or None, headers)
    answer = server.getresponse()
    content = answer.read()
    server.close()
    names = [f"{n}: {v}" for n, v in answer.getheaders() if n.lower() != "connection"]
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *names, "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + content


def _serve(listening: socket.socket) -> None:
    make_server(make_app(Teacher(peaked()))).run(sockets=[listening])


@contextlib.contextmanager
def served(folder: Path, misbehave: Misbehave, bad: range) -> Iterator[Repair]:
    """A teacher's server behind a relay; the second run gets the server itself."""
    folder.mkdir()
    address = folder.with_suffix(".url")
    with listen("127.0.0.1", 0) as own, listen("127.0.0.1", 0) as front:
        port = own.getsockname()[1]
        with (
            background(partial(_serve, own)),
            background(partial(relay, front, port, misbehave, bad)),
        ):
            address.write_text(url_of(front))
            yield lambda: address.write_text(url_of(own))


def _impatient(folder: Path) -> None:
    connection.FIRST_WAIT, connection.LONGEST_WAIT, connection._MAX_RETRY_AFTER = 0.05, 0.1, 1.0


def servers() -> Iterator[Case]:
    for name, misbehave in MISBEHAVIOR.items():
        for when, bad in (("once", range(4, 5)), ("from its 5th answer on", range(4, 10**9))):
            yield Case(
                kind="server",
                task="served",
                name=f"{name}, {when}",
                error="expected|refused|invalid|got none",
                fault=_impatient,
                place=partial(served, misbehave=misbehave, bad=bad),
            )
        yield Case(
            kind="server",
            task="served",
            name=f"{name}, from its first answer on",
            error="expected|refused|invalid|got none",
            fault=_impatient,
            place=partial(served, misbehave=misbehave, bad=range(10**9)),
        )
