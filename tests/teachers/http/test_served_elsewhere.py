"""A client speaks to the server in its URL, and to no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastdistill.teachers.http import ServedTeacher
from fastdistill.teachers.http.connection import Refusal
from helpers.served import vllm
from helpers.training import peaked


class Elsewhere(ThreadingHTTPServer):
    """Answers each request with a redirect to `target`, and counts them."""

    daemon_threads = True

    def __init__(self, target: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Redirect)
        self.target, self.requests = target, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Redirect(BaseHTTPRequestHandler):
    server: Elsewhere

    def do_GET(self) -> None:
        self.server.requests += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(307)
        self.send_header("Location", self.server.target + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_CONNECT = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def running(server: Elsewhere) -> Iterator[Elsewhere]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_redirect_is_not_followed():
    with (
        vllm(peaked()) as target,
        running(Elsewhere(target.url)) as server,
        pytest.raises(Refusal, match="status 307"),
    ):
        ServedTeacher(server.url, retries=0)
    assert server.requests
    assert not target.connections


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with vllm(peaked()) as server, running(Elsewhere()) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        assert ServedTeacher(server.url).topk(torch.tensor([[1, 2, 3]]), k=4).ids.shape == (1, 3, 4)
    assert not proxy.requests
