"""Servers that are slow on purpose, send without end, or are not there: bounded in everything."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from fastdistill import Teacher
from fastdistill.teachers.http import NoAnswer, ServedTeacher, connection
from fastdistill.teachers.http.connection import Connection, _retry_after
from helpers.served import ours, vllm
from helpers.training import peaked

IDS = torch.tensor([[5, 9, 14, 3]])
HEAD = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def talking(talk):
    """A server that answers every connection by `talk(connection, stop)`; gives its URL."""
    stop, listening = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def run():
        with suppress(OSError):
            while True:
                accepted, _ = listening.accept()
                threading.Thread(target=answer, args=(accepted,), daemon=True).start()

    def answer(accepted):
        with suppress(OSError), accepted:
            accepted.recv(65536)
            talk(accepted, stop)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        stop.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def repeatedly(start, piece, pause):
    def talk(accepted, stop):
        accepted.sendall(start)
        while not stop.wait(pause):
            accepted.sendall(piece)

    return talk


SLOW = {
    "status": repeatedly(b"", b"H", 0.2),
    "header": repeatedly(HEAD + b"X-Slow: ", b"a", 0.2),
    "continue": repeatedly(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.2),
    "chunks": repeatedly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.2),
    "chunk size": repeatedly(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0", 0.2),
    "body": repeatedly(HEAD + b"Content-Length: 9999\r\n\r\n", b" ", 0.2),
}
FLOOD = b"x" * (1 << 20)
ENDLESS = {
    "body": repeatedly(HEAD + b"\r\n", FLOOD, 0),
    "promised": repeatedly(HEAD + b"Content-Length: 99999999999\r\n\r\n", FLOOD, 0),
    "chunks": repeatedly(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + FLOOD + b"\r\n", 0
    ),
    "continue": repeatedly(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 9999, 0),
    "error": repeatedly(b"HTTP/1.1 500 Bad\r\n\r\n", FLOOD, 0),
}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("kind", SLOW)
def test_the_timeout_bounds_every_part_of_an_answer(kind):
    with talking(SLOW[kind]) as url:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no whole answer within 0\.6 s"):
            ServedTeacher(url, timeout=0.6, retries=0)
        assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_without_end_is_refused_by_its_size(kind):
    """Once, since asking again would bring as much."""
    with talking(ENDLESS[kind]) as url:
        http = Connection(url, token=None, timeout=20.0, retries=5)
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="expected at most 1,048,576 bytes in answer to /x, got"):
            http.ask("/x", limit=1 << 20)
        assert time.monotonic() - began < 5.0


def test_a_header_without_end():
    with talking(repeatedly(HEAD, b"X-More: 1\r\n" * 999, 0)) as url:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="got more than 100 headers"):
            ServedTeacher(url, timeout=20.0, retries=0)
        assert time.monotonic() - began < 5.0


def test_a_server_that_does_not_read():
    with talking(lambda accepted, stop: stop.wait(20)) as url:
        http = Connection(url, token=None, timeout=0.5, retries=0)
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no whole answer within 0\.5 s"):
            http.ask("/x", {"prompt": "x" * (1 << 25)})
        assert time.monotonic() - began < 3.0


def test_the_limit_leaves_room_for_every_answer():
    """Of the largest question that the client sends in one request, in either form."""
    for tokens, k, of_entry, limit in ((2048, 256, 200, 512), (16384, 256, 12, 16)):
        assert tokens * (k + 1) * of_entry < connection.LARGEST + tokens * (k + 1) * limit


@pytest.mark.slow
@pytest.mark.parametrize("after", ["1e999", "inf", "nan", "-inf", "99999999999", "soon", "600"])
def test_retry_after_does_not_outlast_the_patience(after, monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.01)

    def busy(accepted, stop):
        header = f"HTTP/1.1 503 Busy\r\nRetry-After: {after}\r\nContent-Length: 0\r\n\r\n"
        accepted.sendall(header.encode())

    with talking(busy) as url:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="status 503"):
            ServedTeacher(url, timeout=0.3, retries=3)
        assert time.monotonic() - began < 4 * 0.3 + 1.0


def test_a_moment_that_is_none():
    assert [_retry_after(x) for x in ("1e999", "inf", "nan", "-3")] == [None, None, None, 0.0]
    assert _retry_after("Fri, 31 Dec 99999 23:59:59 GMT") is None


# ---- first contact


def test_a_wrong_address_is_told_soon(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_CONTACT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}", "http://name.invalid"):
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"the last: .*Is the server running there") as caught:
            ServedTeacher(url)
        assert time.monotonic() - began < 5.0
        assert "An address that never answered is retried for a few seconds only" in str(
            caught.value
        )


@pytest.mark.slow
def test_a_server_that_starts_meanwhile_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    clients, over = [], threading.Event()

    def start():
        time.sleep(0.7)
        with ours(Teacher(peaked()), port=port):
            over.wait(20)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        clients.append(ServedTeacher(f"http://127.0.0.1:{port}"))
    finally:
        over.set()
        thread.join()
    clients[0].close()


def test_a_server_that_answered_once_is_waited_for(monkeypatch):
    """Longer than an address that never did."""
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(connection, "FIRST_CONTACT", 0.0)
    with vllm(peaked()) as server:
        client, port = ServedTeacher(server.url, retries=6), server.server_port
        expected = client.topk(IDS, k=3)
        client.close()
    over = threading.Event()

    def again():
        time.sleep(0.5)
        with vllm(peaked(), port=port):
            over.wait(20)

    thread = threading.Thread(target=again)
    thread.start()
    try:
        assert torch.equal(client.topk(IDS, k=3).ids, expected.ids)
    finally:
        over.set()
        thread.join()
    client.close()
