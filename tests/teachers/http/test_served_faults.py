"""Slow, failing, lying and restarting servers: waited for, or refused in words."""

from __future__ import annotations

import json
import logging
import random
import socket
import time

import pytest
import torch

from fastdistill import Teacher
from fastdistill.teachers.http import NoAnswer, ServedTeacher, WrongAnswer, connection
from helpers.served import MODEL, ours, vllm
from helpers.training import peaked, train

IDS = torch.tensor([[5, 9, 14, 3], [7, 7, 30, 2]])


@pytest.fixture(scope="module")
def model():
    return peaked()


@pytest.fixture
def server(model, monkeypatch):
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.01)
    with vllm(model) as server:
        yield server


@pytest.fixture
def client(server):
    client = ServedTeacher(server.url, timeout=0.5, retries=4)
    server.seen.clear()  # of the question at opening
    yield client
    client.close()


def right(model, client, k=4):
    got, expected = client.topk(IDS, k=k), Teacher(model).topk(IDS, k=k)
    return torch.equal(got.ids, expected.ids) and torch.allclose(got.logprobs, expected.logprobs)


# ---- what passes


def slow(handler):
    handler.server.release.wait(5)
    handler.close_connection = True


def dripping(handler):
    """A byte now and then keeps a socket's own timeout from ever passing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.close_connection = True
    while not handler.server.release.wait(0.1):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def dropped(handler):
    handler.close_connection = True


def status(number, **headers):
    body = {"error": {"message": "the engine " + "is dead " * 99}}
    return lambda handler: handler.send(number, body, **headers)


@pytest.mark.parametrize(
    "faults",
    [[slow], [dripping], [cut], [dropped], [status(500)] * 4, [status(429), dropped, status(503)]],
)
def test_what_asking_again_mends(model, server, client, faults):
    server.faults.extend(faults)
    before = random.getstate()
    assert right(model, client)
    assert random.getstate() == before  # a run of the same seed stays the same run
    assert len(server.seen) == len(faults) + 1
    assert not server.faults


def test_retry_after_is_respected(model, server, client):
    server.faults.append(status(429, Retry_After="0.7"))
    began = time.monotonic()
    assert right(model, client)
    assert time.monotonic() - began >= 0.7


def test_one_connection_serves_many_questions(model, server):
    client = ServedTeacher(server.url)
    assert all(right(model, client) for _ in range(3))
    assert server.connections == 1
    client.close()


def test_a_connection_closed_while_idle_costs_no_retry(model, server):
    client = ServedTeacher(server.url, retries=0)

    def answer_and_close(h):
        h.send(*h.server.completion(h.server.seen[-1][0]))
        h.close_connection = True

    for _ in range(3):
        server.faults.append(answer_and_close)
        assert right(model, client)
    client.close()


# ---- what does not


def test_always_failing(server, client, caplog, monkeypatch):
    monkeypatch.setattr(connection, "_WARN_AFTER", 0.03)
    server.faults.extend([status(500)] * 5)
    with caplog.at_level(logging.WARNING), pytest.raises(NoAnswer) as caught:
        client.topk(IDS, k=4)
    message = str(caught.value)
    assert isinstance(caught.value, ConnectionError)
    assert server.url in message
    assert "none in 5 attempts" in message
    assert "the last: status 500: the engine is dead" in message
    assert "Is the server running" in message
    assert len(message) < 700
    assert len(caplog.records) == 1
    assert "does not answer (status 500" in caplog.text


def test_one_failure_stops_the_others(server):
    """Seven requests under way that would wait for ever end with the one that was refused."""
    client = ServedTeacher(server.url, tokens_per_request=1, concurrency=8, timeout=60)
    server.faults.extend([slow] * 7 + [status(400)])
    began = time.monotonic()
    with pytest.raises(ValueError, match="refused the request with status 400: the engine is dead"):
        client.topk(torch.arange(3, 11)[:, None], k=2)
    assert time.monotonic() - began < 4
    client.close()


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NoAnswer, match=r"none in 1 attempts .* ConnectionRefusedError"):
        ServedTeacher(f"http://127.0.0.1:{port}", retries=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"url": "localhost:8000"}, "url: expected http://host:port"),
        ({"url": "http://me:word@localhost"}, "url: expected no name or password in it, got one"),
        ({"model": "x"}, f"model: expected one that .* serves \\({MODEL}\\), got 'x'"),
        ({"timeout": 0}, "timeout: expected a finite number above 0"),
        ({"timeout": "5"}, "timeout: expected a finite number above 0"),
        ({"concurrency": 0}, "concurrency: expected an integer of 1 or more"),
        ({"concurrency": "4"}, "concurrency: expected an integer of 1 or more, got '4'"),
        ({"tokens_per_request": float("inf")}, "tokens_per_request: expected an integer of 1"),
        ({"token": 5}, "token: expected a text, got int"),
        ({"tokenizer": "a/name"}, "tokenizer: expected an object with get_vocab"),
    ],
)
def test_wrong_arguments(server, arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ServedTeacher(**{"url": server.url} | arguments)


NO_URLS = (
    None,
    5,
    b"http://h:1",
    "",
    "h",
    "http://",
    "http://:80",
    "http://h:0",
    "http://h:99999",
    "http://h:x",
    "http://[::1",
    "http://a b:1",
    "http://a..b:1",
    f"http://{'a' * 70}:1",
    "http://\ud800:1",
    "http://h:1/ü",
    "http://h:1/a b",
    "http://h:1/\n",
    " http://h:1",
    "http://h:1/#a",
    "http://h:1?a=1",
    "ftp://h",
    "file:///h",
)


@pytest.mark.parametrize("url", NO_URLS, ids=ascii)
def test_what_is_no_url_of_a_server(url):
    with pytest.raises(ValueError, match=r"^url: expected http://host:port or https") as caught:
        ServedTeacher(url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("patience", [{"timeout": 1e300}, {"retries": 5000}], ids=str)
def test_patience_without_end(model, server, patience):
    client = ServedTeacher(server.url, **patience)
    server.faults.append(status(503))
    assert right(model, client)
    client.close()


def test_no_row_at_all(client):
    assert client.topk(torch.zeros(0, 4, dtype=torch.int64), k=3).ids.shape == (0, 4, 3)


def test_what_it_cannot_give(model, server, client):
    with pytest.raises(ValueError, match=r"k: expected at most 20, .* --max-logprobs 21"):
        client.topk(IDS, k=21)
    with ours(Teacher(model), max_k=8) as url:
        own = ServedTeacher(url)
        with pytest.raises(ValueError, match=r"k: expected an integer in 1\.\.8 .* max_k=9"):
            own.topk(IDS, k=9)
        with pytest.raises(ValueError, match=r"input_ids: expected tokens in 0\.\.52"):
            own.topk(IDS + 50, k=2)
        own.close()


def test_the_temperature_is_asked_for_and_refused(tmp_path, model, server, client):
    words = r"temperature: expected 1, since http.* ignores it .* or fastdistill serve"
    with pytest.raises(ValueError, match=words):
        client.topk(IDS, k=4, temperature=2.0)
    with pytest.raises(ValueError, match=words):
        train(tmp_path, teacher=client, temperature=2.0)
    server.tempered = True
    got = client.topk(IDS, k=4, temperature=2.0)
    expected = Teacher(model).topk(IDS, k=4, temperature=2.0)
    assert torch.allclose(got.logprobs, expected.logprobs, atol=1e-5)
    before = len(server.seen)
    client.topk(IDS, k=4, temperature=2.0)
    assert len(server.seen) == before + 1  # asked once


def entry(change):
    return lambda choice: change(choice["prompt_logprobs"][2])


def set_best(value):
    def change(slots):
        min(slots.values(), key=lambda slot: slot["rank"])["logprob"] = value

    return entry(change)


def rename(rank, name):
    def change(slots):
        by_rank = {slot["rank"]: token for token, slot in slots.items()}
        slots[name(by_rank[1])] = slots.pop(by_rank[rank])

    return entry(change)


def swapped(choice):
    choice["index"] = 1 - choice["index"]


def one_late(choice):
    listed = choice["prompt_logprobs"]
    listed[1:] = [*listed[2:], listed[-1]]


OTHER = r"row 0, position 0: expected the prompt's own next token 9 .* another position"
LIES = {
    "rows": (swapped, OTHER),
    "positions": (one_late, OTHER),
    "1 choices": (lambda c: c.update(index=0), r"expected 2 choices, .* got 2 with the indices"),
    "short": (lambda c: c["prompt_logprobs"].pop(), "row 0: .* with 5 entries, .* got 4.*--no-ena"),
    "none": (lambda c: c.update(prompt_logprobs=None), "row 0: expected .* got NoneType"),
    "null": (lambda c: c["prompt_logprobs"].__setitem__(2, None), "row 0, position 1: .* None"),
    "few": (entry(lambda e: e.popitem() and e.popitem() and e.popitem()), "4 or 5 entries, got"),
    "positive": (
        set_best(0.5),
        "row 0, position 1: logprobs: expected log-probabilities ≤ 0, got 0",
    ),
    "mass": (
        lambda c: [s.update(logprob=-0.1) for s in c["prompt_logprobs"][3].values()],
        "row 0, position 2: logprobs: expected probabilities that sum to 1 at most, got 3.6",
    ),
    "nan": (set_best(float("nan")), "row 0, position 1: expected numbers for log-prob"),
    "text": (set_best("high"), "row 0, position 1: expected ids with logprobs"),
    "never": (
        lambda c: [s.update(logprob=-9999.0) for s in c["prompt_logprobs"][1].values()],
        "row 0, position 0: logprobs: expected a likeliest token above the average",
    ),
    "id": (rename(1, lambda best: "-4"), r"row 0, position 1: expected ids in 0\.\."),
    "twice": (rename(2, lambda best: f"0{best}"), "position 1: ids: expected 4 different ids"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(server, client, lie):
    server.twist, words = LIES[lie]
    with pytest.raises(WrongAnswer, match=words):
        client.topk(IDS, k=4)


def test_an_id_that_is_there_twice(server, client):
    def twice(handler):
        text = json.dumps(handler.server.completion(handler.server.seen[-1][0])[1])
        first = text.index('{"9": ')
        text = f'{text[:first]}{{"9": {{"logprob": -50.0, "rank": 53}}, {text[first + 1 :]}'
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text.encode())

    server.faults.append(twice)
    with pytest.raises(WrongAnswer, match=r"expected each name once in an object, got '9' twice"):
        client.topk(IDS, k=4)


def test_no_json(server, client):
    server.faults.append(lambda handler: handler.send(200, "hello"))
    with pytest.raises(WrongAnswer, match=r"expected JSON with choices, got b'\"hello\"'"):
        client.topk(IDS, k=4)
