"""What ServedTeacher finds out at opening: what the server gives, and which rows fit."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastdistill import Teacher
from fastdistill.losses.types import TopK
from fastdistill.teachers.http import ServedTeacher, WrongAnswer
from fastdistill.teachers.http.probing import are_logits
from helpers.present import present
from helpers.served import MODEL, VLLM, ours, vllm
from helpers.training import llama, peaked

IDS = torch.tensor([[5, 9, 14, 3]])
ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b[2J‮\ud800"
# A listing as each program writes it, the fields that matter here.
LLAMACPP = {"id": "models/a.Q4_1.gguf", "owned_by": "llamacpp", "meta": {"n_vocab": 49152}}
PROXY = {"id": "gpt-x", "owned_by": "openai"}
SGLANG = {"id": "m", "owned_by": "sglang", "root": "m", "parent": None, "max_model_len": 512}


@contextmanager
def saying(entry, status, answer):
    """A server with this listing that answers every question so."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, status, body):
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self):
            self.send(200, {"object": "list", "data": [entry]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send(status, answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refused(message, status=400):
    return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}


# ---- prompt_logprobs


CHAT = {"choices": [{"index": 0, "text": ".", "logprobs": None, "finish_reason": "length"}]}
WITHOUT = {
    "llama.cpp ignores it": (LLAMACPP, 200, CHAT, "serve --teacher MODEL.gguf, which reads the sa"),
    "SGLang ignores it": (SGLANG, 200, CHAT, "owned by 'sglang'.* does not give log-probabilities"),
    "a proxy drops it": (PROXY, 200, CHAT, "owned by 'openai'.*with vLLM, or with fastdistill"),
    "a proxy refuses it": (
        PROXY,
        *refused("Unrecognized request argument: prompt_logprobs"),
        "expected prompt_logprobs, got status 400: Unrecog.*with vLLM",
    ),
    "validation": (
        PROXY,
        422,
        {"detail": "body.prompt_logprobs: extra fields not permitted"},
        "expected prompt_logprobs, got status 422: body.*with vLLM",
    ),
    "no completions": (
        PROXY,
        *refused("Not Found", 404),
        "an answer to /v1/completions, got status 404: Not Found.*with vLLM",
    ),
    "only chat": (PROXY, 405, {"detail": "Method Not Allowed"}, "completions, got status 405"),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_server_without_prompt_logprobs(kind):
    entry, status, answer, words = WITHOUT[kind]
    with saying(entry, status, answer) as url, pytest.raises(WrongAnswer, match=words) as caught:
        ServedTeacher(url, retries=0)
    assert "prefix" not in str(caught.value)


def with_logprobs(value):
    return {"choices": [{"index": 0, "prompt_logprobs": value}]}


def test_three_causes_have_three_messages():
    for value, words, absent in (
        (None, "does not give log-probabilities of prompts", "prefix"),
        ([None, {}, {}], r"with 9 entries.*got 3\. .*--no-enable-prefix-caching", "owned by"),
        ({"content": []}, "a list of prompt_logprobs.* got dict.*another protocol", "prefix"),
    ):
        with saying(PROXY, 200, with_logprobs(value)) as url:
            with pytest.raises(WrongAnswer, match=words) as caught:
                ServedTeacher(url, retries=0)
            assert absent not in str(caught.value)


# ---- logits in the place of log-probabilities


class Logits(VLLM):
    """Says logits, `shift` beside their log-probabilities."""

    shift = 0.0

    def _position(self, prompt, k, temperature):
        listed = super()._position(prompt, k, temperature)
        for entry in listed[1:]:
            for slot in entry.values():
                slot["logprob"] += self.shift
        return listed


@pytest.mark.parametrize("shift", [27.0, 1.0, -20.0, -60.0, -400.0])
def test_logits_are_found_at_opening(shift):
    with vllm(peaked(), kind=Logits) as server:
        server.shift = shift
        with pytest.raises(WrongAnswer, match="without --logprobs-mode raw_logits"):
            ServedTeacher(server.url)


def test_log_probabilities_are_no_logits():
    """However flat, peaked, or cut the distribution is."""
    generator = torch.Generator().manual_seed(0)
    for vocab in (2, 53, 50_000, 1 << 20):
        for scale in (0.0, 1.0, 30.0):
            logits = torch.randn(4, vocab, generator=generator) * scale
            logits[0, 1:] = -torch.inf
            for k in (1, 2, min(vocab, 64)):
                best = logits.log_softmax(-1).topk(k)
                assert not are_logits(TopK(best.indices, best.values))
                assert are_logits(TopK(best.indices, best.values - 30))


# ---- lengths of rows


@contextmanager
def of_length(entry):
    """vLLM with more in its listing."""
    with vllm(peaked()) as server:
        server.listed = entry
        yield server


@pytest.mark.parametrize(("length", "fits"), [(16, 14), (3, 1)])
def test_a_row_that_vllm_does_not_take_is_named(length, fits):
    with of_length({"max_model_len": length}) as server:
        client = ServedTeacher(server.url)
        assert client.max_row_length == present(client.row_limit).tokens == fits
        server.seen.clear()
        client.topk(torch.ones(2, fits, dtype=torch.int64), k=2)
        assert len(server.seen) == 1
        ids = torch.ones(3, fits + 2, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[:2, fits:] = 0
        words = (
            rf"input_ids: expected rows of at most {fits} tokens, .*--max-model-len {length}.*"
            rf"got {fits + 2} tokens in row 2; .*max_length={fits}"
        )
        with pytest.raises(ValueError, match=words):
            client.topk(ids, mask, k=2)
        assert len(server.seen) == 1
        client.close()


def test_a_length_that_cannot_be():
    for length in (0, -5, "512", 1.5, True, [512]):
        with (
            of_length({"max_model_len": length}) as server,
            pytest.raises(WrongAnswer, match="expected max_model_len above 0"),
        ):
            ServedTeacher(server.url)
    with of_length({"max_model_len": None}) as server:
        client = ServedTeacher(server.url)
        assert (client.max_row_length, client.row_limit) == (None, None)
        client.close()


def test_vllms_own_words_about_a_length():
    """A proxy may leave max_model_len out; the row is that of the batch, not of the request."""
    message = (
        "This model's maximum context length is 8 tokens. However, your prompt contains at "
        "least 12 input tokens (parameter=input_tokens, value=12)"
    )
    with vllm(peaked()) as server:
        client = ServedTeacher(server.url, tokens_per_request=4, concurrency=1)
        answer = server.completion

        def completion(body):
            rows = body["prompt"]
            return refused(message) if max(map(len, rows)) > 6 else answer(body)

        server.completion = completion
        ids, mask = torch.ones(3, 11, dtype=torch.int64), torch.ones(3, 11, dtype=torch.int64)
        mask[:2, 4:] = 0
        with pytest.raises(ValueError, match=r"at most 6 tokens.*got 11 tokens in row 2; .*gth=6"):
            client.topk(ids, mask, k=2)
        client.close()


def test_our_server_says_its_limit():
    with ours(Teacher(llama(7)), max_tokens=9999) as url:
        client = ServedTeacher(url)
        assert client.max_row_length == llama(7).config.max_position_embeddings
        client.close()
    with ours(Teacher(llama(7)), max_tokens=6) as url:
        client = ServedTeacher(url)
        assert client.max_row_length == 6
        with pytest.raises(ValueError, match=r"at most 6 tokens.*got 7 tokens in row 0.*max_tok"):
            client.topk(torch.ones(1, 7, dtype=torch.int64), k=2)
        client.close()


# ---- what a server writes


SAYS = {
    "an error": (PROXY, *refused(ESCAPES)),
    "an error that is no JSON": (PROXY, 400, ESCAPES),
    "its owner": ({"id": "x", "owned_by": ESCAPES}, 200, CHAT),
    "its length": ({"id": "x", "max_model_len": ESCAPES}, 200, CHAT),
    "an entry": (PROXY, 200, with_logprobs([None, *[ESCAPES] * 8])),
    "an id": (PROXY, 200, with_logprobs([None, *[{ESCAPES: {"logprob": 0}}] * 8])),
    "an index": (PROXY, 200, {"choices": [{"index": ESCAPES}]}),
    "protocol": (PROXY, 200, CHAT, {"protocol": ESCAPES}),
    "more": (PROXY, 200, CHAT, {"protocol": 1, ESCAPES: 1}),
}


@pytest.mark.parametrize("kind", SAYS)
def test_nothing_that_a_server_writes_acts_on_a_terminal(kind, monkeypatch):
    entry, status, answer, *own = SAYS[kind]
    if own:
        monkeypatch.setattr(
            "json.dumps",
            lambda body, dumps=json.dumps: dumps(
                body | {"fastdistill": own[0]} if "data" in body else body
            ),
        )
    with (
        saying(entry, status, answer) as url,
        pytest.raises(ValueError, match=r"expected|refused") as caught,
    ):
        ServedTeacher(url, retries=0).topk(IDS, k=2)
    assert str(caught.value).isprintable()
    str(caught.value).encode()


def test_the_names_of_models():
    with (
        saying({"id": ESCAPES}, 200, CHAT) as url,
        pytest.raises(ValueError, match="model: ") as caught,
    ):
        ServedTeacher(url, model=MODEL, retries=0)
    assert str(caught.value).isprintable()


def test_answers_that_no_number_can_hold():
    deep = "[" * 100_000
    huge = {"9" * 40: {"logprob": -1.0}, "1": {"logprob": -2.0}}
    large = {"2": {"logprob": int("9" * 400)}, "1": {"logprob": -2.0}}
    for entry, words in ((huge, "expected ids in 0"), (large, "expected ids with logprobs")):
        with (
            saying(PROXY, 200, with_logprobs([None, *[entry] * 8])) as url,
            pytest.raises(WrongAnswer, match=words),
        ):
            ServedTeacher(url, retries=0)
    with vllm(peaked()) as server:
        client = ServedTeacher(server.url, retries=0)

        def nested(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(deep)))
            handler.end_headers()
            handler.wfile.write(deep.encode())

        server.faults.append(nested)
        with pytest.raises(WrongAnswer, match="expected JSON with choices"):
            client.topk(IDS, k=2)
        client.close()
