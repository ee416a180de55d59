"""fastdistill serve and clients that leave, wait, lie about themselves or write what is no text."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from fastdistill import Teacher
from fastdistill.teachers.http import app
from fastdistill.teachers.http import http_protocol as protocol
from helpers.busy_server import Held
from helpers.served import ours
from helpers.training import peaked

BODY = b'{"k":2,"prompt":[[5,6,7]]}'


@pytest.fixture(scope="module")
def url():
    with ours(Teacher(peaked())) as url:
        yield url


def connected(url, timeout=20):
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=timeout)


def head(length, host="127.0.0.1", more=b""):
    return (
        (
            f"POST /v1/topk HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n"
        ).encode()
        + more
        + b"\r\n"
    )


def ask(url, body, path="/v1/topk", method="POST", **headers):
    """(status, body) of a request with these headers in place of the usual ones."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        headers = {"Content-Type": "application/json"} | headers
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def received(client):
    """All that comes until the server closes the connection."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


# ---- leaving


def leave_in_the_head(client):
    client.sendall(head(9)[:30])


def leave_in_the_body(client):
    client.sendall(head(100) + b"{")


def leave_while_waiting(client):
    client.sendall(head(len(BODY)) + BODY)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("leave", [leave_in_the_head, leave_in_the_body, leave_while_waiting])
def test_a_client_that_leaves_costs_a_line(leave, caplog):
    caplog.set_level(logging.INFO)
    teacher = Held(peaked())
    with ours(teacher) as url:
        for _ in range(3):
            client = connected(url)
            leave(client)
            time.sleep(0.1)
            client.close()
        time.sleep(0.2)
        teacher.go.set()
        assert ask(url, BODY)[0] == 200
    ours_lines = [r for r in caplog.records if r.name.startswith(("fastdistill", "uvicorn"))]
    lines = [r.getMessage() for r in ours_lines if r.name != "uvicorn.error" or r.levelno > 20]
    assert lines == ["a client left before its answer to /v1/topk"] * (
        0 if leave is leave_in_the_head else 3
    )
    assert all(record.exc_info is None for record in caplog.records)


# ---- holding a connection open


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    "sent",
    [b"", b"P", head(9)[:40], head(100) + b"{", head(100)],
    ids=["nothing", "a byte", "half a head", "half a body", "no body"],
)
def test_what_is_left_half_said_is_closed(sent, monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 0.4)
    monkeypatch.setattr(app, "_PIECE_SECONDS", 0.4)
    with ours(Teacher(peaked())) as url:
        began, client = time.monotonic(), connected(url)
        client.sendall(sent)
        answer = received(client)
        assert time.monotonic() - began < 3.0
        assert (answer == b"") or answer.startswith(b"HTTP/1.1 408 ")
        client.close()


CHUNKED = head(9).replace(b"Content-Length: 9", b"Transfer-Encoding: chunked")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"POST /v1/topk HTTP/1.1\r\nX-Slow: ", b"1"),
        (head(9999), b"1"),
        (CHUNKED, b"1\r\n1\r\n"),
        (CHUNKED + b"fff\r\n", b"1"),
        (CHUNKED + b"5;name=", b"1"),
    ],
    ids=["head", "body", "chunks", "one chunk", "head of a chunk"],
)
def test_a_byte_now_and_then_is_not_enough(start, piece, monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 0.6)
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.6)
    with ours(Teacher(peaked())) as url:
        began, client = time.monotonic(), connected(url)
        client.sendall(start)
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - began < 25.0:
                client.sendall(piece)
                time.sleep(0.1)
        took = time.monotonic() - began
        client.close()
        assert took < 20.0


def test_the_rest_of_a_refused_body_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 0.4)
    with ours(Teacher(peaked())) as url:
        began, client = time.monotonic(), connected(url)
        client.sendall(head(100).replace(b"application/json", b"text/plain") + b"{")
        assert received(client).startswith(b"HTTP/1.1 415 ")
        assert time.monotonic() - began < 3.0
        client.close()


@pytest.mark.slow
def test_a_connection_that_is_kept_is_not_closed(monkeypatch):
    """Neither while the teacher computes nor between two requests."""
    monkeypatch.setattr(protocol, "SECONDS", 0.2)
    teacher = Held(peaked())
    with ours(teacher) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        for _ in range(2):
            teacher.go.clear()
            connection.request("POST", "/v1/topk", BODY, {"Content-Type": "application/json"})
            sock = connection.sock
            time.sleep(0.5)
            teacher.go.set()
            assert connection.getresponse().read()
            time.sleep(0.5)
            assert connection.sock is sock
        connection.close()


# ---- web pages


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.2"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:8000"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "10.0.0.1"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "a@127.0.0.1@evil"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost@evil.example"}, 403),
    ],
)
def test_without_a_token_only_this_machine_is_answered(url, headers, status):
    """A name that leads here from elsewhere (DNS rebinding) is another one in Host."""
    assert ask(url, BODY, **headers)[0] == status
    assert ask(url, None, "/v1/models", "GET", **headers)[0] == status
    assert ask(url, None, "/health", "GET", **headers)[0] == 200


def test_with_a_token_every_name_is_answered():
    with ours(Teacher(peaked()), token="x") as url:
        elsewhere = {"Host": "teacher.example", "Origin": "http://teacher.example"}
        assert ask(url, BODY, Authorization="Bearer x", **elsewhere)[0] == 200
        assert ask(url, BODY, **elsewhere)[0] == 401


def test_two_lengths_of_one_body(url):
    """Which of them counts is another thing to a proxy: the next request could be smuggled in."""
    smuggled = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    client = connected(url)
    body = b"0\r\n\r\n" + smuggled
    client.sendall(head(len(body), more=b"Transfer-Encoding: chunked\r\n") + body)
    answer = received(client)
    client.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


# ---- text that is none


SURROGATE = "\ud800"
FIELDS = (
    "model",
    "prompt",
    "k",
    "temperature",
    "stream",
    "n",
    "logprobs",
    "echo",
    "max_tokens",
    "prompt_logprobs",
    "seed",
    "top_p",
    "logit_bias",
    "stop",
    SURROGATE,
)


@pytest.mark.parametrize("path", ["/v1/topk", "/v1/completions"])
@pytest.mark.parametrize("field", FIELDS)
def test_half_a_character_is_a_bad_request(url, path, field):
    for value in (SURROGATE, [SURROGATE], {SURROGATE: SURROGATE}, [[SURROGATE]]):
        body = {"prompt": [[1]], "k": 1} if "topk" in path else {"prompt": [1], "max_tokens": 1}
        status, answer = ask(url, json.dumps(body | {field: value}), path)
        assert 400 <= status < 500
        assert json.loads(answer)["error"]["message"].isprintable()


def test_half_a_character_in_a_path(url):
    for path in ("/v1/models/%ED%A0%80", "/%ED%A0%80", "/v1/models/%1b%5b2J"):
        status, answer = ask(url, None, path, "GET")
        assert status == 404
        assert json.loads(answer)["error"]["message"].isprintable()


@pytest.mark.parametrize(
    "body",
    [
        b'{"k":1,"k":2,"prompt":[1]}',
        b"\xff",
        b'"\xed\xa0\x80"',
        b"[" * 60_000,
        b"{" * 60_000,
        b"9" * 5000,
        b"",
        b"NaN",
    ],
)
def test_what_is_no_json(url, body):
    status, answer = ask(url, body)
    assert status == 400
    assert json.loads(answer)["error"]["message"].startswith("body: expected")
