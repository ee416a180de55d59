"""Servers for tests: ours in a thread, and one that speaks vLLM's JSON and can be told to fail."""

from __future__ import annotations

import json
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from fastdistill.teachers.http import make_app
from fastdistill.teachers.http.server import listen, make_server, url_of

MODEL = "a-teacher"
# lm-eval 0.4.13, local-completions, a request for log-likelihoods without its model and prompt.
LM_EVAL = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@contextmanager
def ours(teacher, *, port=0, **options):
    """fastdistill serve on a free port; gives the URL."""
    listening = listen("127.0.0.1", port)
    server = make_server(make_app(teacher, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    url = url_of(listening)
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class VLLM(ThreadingHTTPServer):
    """Answers from dense logits. `faults`: what to do in place of the next answers. `twist`:
    changes each answer's prompt_logprobs. `tempered`: whether it honours the temperature.
    `listed`: more about the model in its list."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, model, *, tempered=False, most=20, port=0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.tempered, self.most = model, tempered, most
        self.faults: deque[Any] = deque()
        self.twist: Any = None
        self.seen: list[Any] = []
        self.connections, self.listed = 0, {}
        self.release = threading.Event()  # ends answers that take forever

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def completion(self, body):
        k = body["prompt_logprobs"]
        if k > self.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            error = {"message": f"{message}{self.most}", "type": "BadRequestError", "code": 400}
            return 400, {"error": error}
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            T = body["temperature"] if self.tempered else 1.0
            choices.append(
                {"index": index, "text": "", "prompt_logprobs": self._position(prompt, k, T)}
            )
        for choice in choices if self.twist else []:
            self.twist(choice)
        return 200, {"object": "text_completion", "model": MODEL, "choices": choices}

    def scores(self, body):
        """Log-probabilities of given ids; a server without --enable-scale-out has none."""
        message = "Scale-out endpoints are disabled."
        return 403, {"error": {"message": message, "type": "PermissionDeniedError", "code": 403}}

    @torch.no_grad()
    def _position(self, prompt, k, temperature):
        logits = self.model(input_ids=torch.tensor([prompt])).logits[0]
        logprobs = (logits / temperature).log_softmax(-1)
        positions: list[Any] = [None]
        for t, token in enumerate(prompt[1:]):
            order = logprobs[t].argsort(descending=True).tolist()
            tokens = dict.fromkeys([token, *order[:k]])
            positions.append(
                {
                    str(i): {
                        "logprob": logprobs[t, i].item(),
                        "rank": order.index(i) + 1,
                        "decoded_token": f"<{i}>",
                    }
                    for i in tokens
                }
            )
        return positions


class _Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send(
            200,
            {"object": "list", "data": [{"id": MODEL, "root": "/weights", **self.server.listed}]},
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers))
        if self.server.faults:
            return self.server.faults.popleft()(self)
        if self.path == "/inference/v1/generate":
            return self.send(*self.server.scores(body))
        return self.send(*self.server.completion(body))

    def send(self, status, body, **headers):
        payload = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@contextmanager
def vllm(model, kind=VLLM, **options):
    server = kind(model, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
