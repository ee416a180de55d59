"""What our own protocol can get wrong on the way, and the edges of the connection."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate

import pytest
import torch
from safetensors.torch import load, save

from fastdistill import Teacher
from fastdistill.losses.types import TopK
from fastdistill.teachers.http import NoAnswer, ServedTeacher, WrongAnswer, app
from fastdistill.teachers.http.connection import _retry_after, message_of
from fastdistill.teachers.http.probing import is_tempered
from fastdistill.teachers.http.server_info import ServerInfo
from helpers.present import present
from helpers.served import VLLM, ours, vllm
from helpers.training import VOCAB, peaked

IDS = torch.tensor([[5, 9, 14, 3], [7, 7, 30, 2]])


@pytest.fixture(scope="module")
def url():
    with ours(Teacher(peaked())) as url:
        yield url


def change(**of):
    """Each tensor of a packed answer as its function leaves it."""

    def changed(body):
        return save({n: of.get(n, lambda x: x)(x).contiguous() for n, x in load(body).items()})

    return changed


def at_5(value):
    def put(x):
        x[5] = value
        return x

    return put


def less(x):
    return x[:-1]


def narrow(x):
    return x[:, :3]


LIES = {
    "garbage": (lambda body: b"hello", "expected ids, logprobs and log_tail, got"),
    "half": (lambda body: body[: len(body) // 2], "expected ids, logprobs and log_tail, got"),
    "no tail": (lambda body: save({"ids": torch.ones(1)}), "got 'logprobs'"),
    "types": (change(ids=torch.Tensor.long), "expected int32 and floats, got torch.int64"),
    "shapes": (change(log_tail=less), r"expected ids \[N, k\], got \[8, 4\], \[7\]"),
    "rows": (change(ids=less, logprobs=less, log_tail=less), r"expected 8 positions .* got \[7, 4"),
    "k": (change(ids=narrow, logprobs=narrow), "8 positions with 4 entries each, got .8, 3"),
    "vocabulary": (
        change(ids=at_5(VOCAB)),
        r"row 1, position 1: ids: expected ids in 0\.\.52, got 53",
    ),
    "negative": (change(ids=at_5(-1)), r"row 1, position 1: ids: expected ids in 0\.\.52, got -1"),
    "nan": (change(logprobs=at_5(float("nan"))), "row 1, position 1: logprobs: expected numbers"),
    "uniform": (change(logprobs=at_5(-9.0)), "a likeliest token above the average, got -9"),
    "tail": (
        change(log_tail=at_5(-0.01)),
        "row 1, position 1: log_tail: expected the ids and the tail",
    ),
    "tail nan": (
        change(log_tail=at_5(float("nan"))),
        "row 1, position 1: log_tail: expected log-.* got NaN",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_our_own_form(monkeypatch, url, lie):
    twist, words = LIES[lie]
    packed = app._packed
    client = ServedTeacher(url)
    assert client.topk(IDS, k=4).ids.shape == (2, 4, 4)
    monkeypatch.setattr(app, "_packed", lambda answers: twist(packed(answers)))
    with pytest.raises(WrongAnswer, match=words):
        client.topk(IDS, k=4)
    client.close()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protocol": 2}, "expected protocol 1 of fastdistill serve, got 2"),
        ({"max_k": 0}, "expected counts above 0"),
        ({"vocab_size": "many"}, "expected counts above 0"),
        ({"identity": None}, "expected counts above 0 and an identity"),
        ({"max_tokens": 10**400}, "expected counts above 0"),
        ({"honours_temperature": "no"}, "expected counts above 0"),
        ({"more": 1}, "expected the fields of fastdistill serve"),
    ],
)
def test_what_a_server_says_of_itself_is_checked(monkeypatch, url, changed, words):
    as_json = ServerInfo.as_json
    monkeypatch.setattr(ServerInfo, "as_json", lambda self: as_json(self) | changed)
    with pytest.raises(WrongAnswer, match=words):
        ServedTeacher(url)


@pytest.mark.parametrize("of", [{"step": float("nan")}, {"step": [float("inf")]}], ids=str)
def test_an_identity_that_no_cache_could_keep(of):
    info = {
        "protocol": 1,
        "version": "1",
        "honours_temperature": True,
        "vocab_size": 9,
        "max_k": 9,
        "max_tokens": 9,
        "tokenizer_sha256": None,
    }
    assert ServerInfo.read(info | {"identity": {"step": 1.0}}, "http://h").vocab_size == 9
    with pytest.raises(WrongAnswer, match="expected counts above 0 and an identity"):
        ServerInfo.read(info | {"identity": of}, "http://h")


def test_a_double_precision_teacher_keeps_its_digits():
    teacher = Teacher(peaked().double())
    with ours(teacher) as url:
        client = ServedTeacher(url)
        got, expected = client.topk(IDS, k=4), teacher.topk(IDS, k=4)
        client.close()
    assert got.logprobs.dtype == torch.float64
    assert torch.equal(got.logprobs, expected.logprobs)
    assert torch.equal(present(got.log_tail), present(expected.log_tail))


def test_the_relation_between_temperatures():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 4

    def at(temperature, noise=0.0):
        best = (logits / temperature).log_softmax(-1).topk(2)
        return TopK(best.indices, best.values + noise * torch.arange(2), None, temperature)

    assert is_tempered(at(1.0), at(2.0), 2.0)
    assert is_tempered(at(1.0), at(2.0, 0.005), 2.0)
    assert not is_tempered(at(1.0), at(1.0), 2.0)
    assert not is_tempered(at(1.0), at(1.6), 2.0)
    flat = TopK(at(1.0).ids, torch.full((6, 2), -3.0))
    assert not is_tempered(flat, flat, 2.0)  # nothing shows it


def test_what_servers_write_beside_an_answer():
    assert message_of(b'{"error": {"message": "one"}}') == "one"
    assert message_of(b'{"object": "error", "message": "two"}') == "two"
    assert message_of(b'{"detail": "three"}') == "three"
    assert message_of(b"<html> four") == "<html> four"
    assert message_of(b"") == "no message"
    assert len(message_of(b"word " * 500)) <= 300
    assert _retry_after("2.5") == 2.5
    assert 50 < present(_retry_after(formatdate(time.time() + 60, usegmt=True))) <= 60
    assert _retry_after("soon") is None
    assert _retry_after(None) is None


def test_the_timeout_is_for_the_whole_answer():
    """A first byte at 0.8 s does not start another second."""

    def late(handler):
        handler.server.release.wait(0.8)
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.close_connection = handler.server.release.wait(5)

    with vllm(peaked()) as server:
        client = ServedTeacher(server.url, retries=0, timeout=1.0)
        server.faults.append(late)
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="no whole answer within 1 s"):
            client.topk(IDS, k=4)
        assert time.monotonic() - began < 1.5
        client.close()


@contextmanager
def with_tls(folder, server):
    key, certificate = folder / "key.pem", folder / "cert.pem"
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names)
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.url.replace("http:", "https:"), certificate
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_https_is_believed_only_with_a_certificate(tmp_path, monkeypatch):
    with with_tls(tmp_path, VLLM(peaked())) as (url, certificate):
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="its certificate is not trusted"):
            ServedTeacher(url)
        assert time.monotonic() - began < 5  # asking again would change nothing
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        client = ServedTeacher(url)
        assert torch.equal(client.topk(IDS, k=4).ids, Teacher(peaked()).topk(IDS, k=4).ids)
        client.close()
