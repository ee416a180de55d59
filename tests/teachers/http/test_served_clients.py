"""fastdistill serve and many clients, slow ones, and ones that leave."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import uvicorn
from uvicorn.server import ServerState

from fastdistill import Teacher
from fastdistill.teachers.http import http_protocol as protocol
from fastdistill.teachers.http import server
from fastdistill.teachers.http.worker import Worker
from helpers.busy_server import Held
from helpers.served import LM_EVAL, ours
from helpers.training import VOCAB, peaked


def ask(url, path="/v1/completions", **fields):
    """(status, headers, value)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(fields), headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())
    finally:
        connection.close()


def connected(url):
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=20)


def send(client, **fields):
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/topk HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)


class Queued:
    """Counts the questions that the queue takes; `futures` refers to their answers, weakly."""

    def __init__(self):
        self.taken, self.futures = threading.Semaphore(0), []

    def wait(self, count):
        assert all(self.taken.acquire(timeout=20) for _ in range(count))


@pytest.fixture
def queued(monkeypatch):
    queued, submit = Queued(), Worker.submit

    def counted(worker, question):
        future = submit(worker, question)
        queued.futures.append(weakref.ref(future))
        queued.taken.release()
        return future

    monkeypatch.setattr(Worker, "submit", counted)
    return queued


# ---- many clients


def test_64_clients_share_batches_and_get_their_own_answers(queued):
    model, teacher = peaked(), Held(peaked())
    rows = [[3 + i % 40, 9, 3 + i % 7, 20][: 2 + i % 3] for i in range(64)]
    with torch.no_grad():  # the model is causal: what follows a row changes nothing
        truth = model(torch.tensor([[*row, 0, 0][:4] for row in rows])).logits.log_softmax(-1)
    with ours(teacher, name="t") as url, ThreadPoolExecutor(64) as pool:
        try:
            responses = [pool.submit(ask, url, model="t", prompt=[row], **LM_EVAL) for row in rows]
            queued.wait(64)
        finally:
            teacher.go.set()
        for row, logprobs, future in zip(rows, truth, responses, strict=True):
            status, _, answer = future.result()
            assert status == 200
            expected = [logprobs[t, token].item() for t, token in enumerate(row[1:])]
            got = answer["choices"][0]["logprobs"]["token_logprobs"]
            assert got[1:-1] == pytest.approx(expected, abs=1e-5)
    assert sum(teacher.sizes) == 64
    assert len(teacher.sizes) < 8


def silent(url):
    """A connection that the server has accepted; it may close it at once."""
    client = connected(url)
    time.sleep(0.05)
    return client


def test_connections_beyond_the_limit_get_503(monkeypatch, queued):
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    teacher, other = Held(peaked()), {"prompt": [[5, 6]], "max_tokens": 1}
    with ours(teacher) as url:
        try:
            waiting = [connected(url) for _ in range(2)]
            for client in waiting:
                send(client, prompt=[[5, 9, 14, 3]], k=3)
                queued.wait(1)
            status, headers, answer = ask(url, **other)
            assert (status, headers["Retry-After"], headers["Connection"]) == (503, "2", "close")
            assert answer["error"]["message"] == "the server has 2 connections, retry later"
            assert answer["error"]["type"] == "ServiceUnavailable"
            monkeypatch.setattr(protocol, "SECONDS", 0.4)
            surplus = [silent(url) for _ in range(3)]
            for client in surplus:  # the last one at once, the others after 0.4 s
                client.settimeout(5)
                assert client.recv(1) == b""
            monkeypatch.setattr(protocol, "SECONDS", 20.0)
        finally:
            teacher.go.set()
        for client in waiting:
            assert client.recv(9) == b"HTTP/1.1 "
        # Both are idle now, and the first one makes room.
        assert ask(url, **other)[0] == 200
        waiting[0].settimeout(5)
        while waiting[0].recv(1 << 16):
            pass
        send(waiting[1], prompt=[[5, 9, 14, 3]], k=3)
        queued.wait(1)
        for client in (*waiting, *surplus):
            client.close()


# ---- clients that leave


def test_those_who_leave_give_back_their_place_in_the_queue(queued):
    teacher = Held(peaked())

    def patient(url):
        end = time.monotonic() + 10
        while (status := ask(url, prompt=[[7, 7, 7]], max_tokens=1)[0]) == 503:
            assert time.monotonic() < end
            time.sleep(0.02)
        return status

    # 4 tokens a question: one is being answered, four wait, and for another there is no room.
    with ours(teacher, max_tokens=4) as url, ThreadPoolExecutor(1) as pool:
        try:
            clients = [connected(url) for _ in range(5)]
            send(clients[0], prompt=[[5, 9, 14, 3]], k=3)
            assert teacher.calls.acquire(timeout=20)
            for client in clients[1:]:
                send(client, prompt=[[5, 9, 14, 3]], k=3)
            queued.wait(5)
            assert ask(url, prompt=[[7, 7, 7]], max_tokens=1)[0] == 503
            for client in clients:
                client.close()
            waiting = pool.submit(patient, url)
            queued.wait(1)
            end = time.monotonic() + 10
            while sum(future() is not None for future in queued.futures) > 2:
                assert time.monotonic() < end
                gc.collect()
        finally:
            teacher.go.set()
        assert waiting.result() == 200
    assert teacher.sizes == [1, 1]


# ---- clients that do not read


def test_an_answer_that_nobody_reads_is_cut(caplog, monkeypatch):
    """One client stops reading, one leaves in the middle."""
    monkeypatch.setattr(protocol, "_UNREAD_SECONDS", 0.1)
    accept = server.listen

    def listen(host, port):
        listening = accept(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections, too
        return listening

    monkeypatch.setattr("helpers.served.listen", listen)
    with ours(Teacher(peaked())) as url, connected(url) as client:
        for asking in (connected(url), client):
            send(asking, prompt=[[3] * 60] * 20, k=VOCAB)
            arrived = len(asking.recv(1))
            if asking is not client:
                asking.close()
        time.sleep(0.7)
        while piece := client.recv(1 << 20):
            arrived += len(piece)
    assert arrived < 20 * 60 * VOCAB * 8
    assert all(record.exc_info is None for record in caplog.records)


class Reader:
    """A transport whose buffer a client empties, and the timers around it."""

    def __init__(self, unread):
        self.unread, self.aborted, self.timers = unread, False, []

    def get_write_buffer_size(self):
        return self.unread

    def abort(self):
        self.aborted = True

    def call_later(self, seconds, call):
        self.timers.append((seconds, call))
        return SimpleNamespace(cancel=lambda: None)

    def get_extra_info(self, _):
        return None

    def is_closing(self):
        return True

    def set_write_buffer_limits(self, **_):
        pass

    def pass_time(self):
        due, self.timers = self.timers, []
        for seconds, call in due:
            if seconds == protocol._UNREAD_SECONDS:
                call()


@pytest.mark.parametrize(
    ("left", "aborted"),
    [([400_000, 300_000, 20_000, 0], False), ([400_000, 399_000], True), ([500_000], True)],
    ids=["reads", "reads a little", "reads nothing"],
)
def test_a_reader_has_time_while_it_reads(left, aborted):
    """Also if the whole answer takes longer, or is in the buffer of a closing connection."""
    reader: Any = Reader(500_000)
    connection: Any = protocol.BoundedProtocol(
        uvicorn.Config(protocol._refuse), ServerState(), {}, reader
    )
    connection.connection_made(reader)
    connection.on_response_complete()
    for unread in left:
        reader.unread = unread
        reader.pass_time()
    assert reader.aborted is aborted
    reader.pass_time()
    assert not any(seconds == protocol._UNREAD_SECONDS for seconds, _ in reader.timers)
