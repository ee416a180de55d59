"""A teacher behind a socket answers as the teacher itself, to our client and to vLLM's."""

from __future__ import annotations

import http.client
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill import Teacher, TeacherCache, load_teacher
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.hf.collator import padded
from fastdistill.hf.encoder import Encoder
from fastdistill.teachers.http import ServedTeacher, WrongAnswer, serve
from helpers.present import present
from helpers.served import MODEL, ours, vllm
from helpers.training import VOCAB, build, llama, peaked, ragged, train, weights

RUN = {"max_steps": 3, "per_device_train_batch_size": 5, "data": ragged(12)}


@pytest.fixture(scope="module")
def teacher():
    return Teacher(peaked())


@pytest.fixture(scope="module")
def url(teacher):
    with ours(teacher) as url:
        yield url


@pytest.fixture
def batch():
    """Rows of 4 to 23 tokens, padded right; the second half left; one row is empty."""
    encoder = Encoder()
    columns = padded([encoder(row, i) for i, row in enumerate(ragged(8))], 0)
    ids, mask = columns["input_ids"], columns["attention_mask"]
    for b in range(4, 8):
        shift = int((mask[b] == 0).sum())
        ids[b], mask[b] = ids[b].roll(shift), mask[b].roll(shift)
    mask[2] = 0
    return ids, mask


def candidates(ids):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-1, VOCAB, (*ids.shape, 6), generator=generator)


@pytest.mark.parametrize("tokens_per_request", [None, 20])
def test_given_ids_are_scored_with_the_same_bits(teacher, url, batch, tokens_per_request):
    ids, mask = batch
    scored = candidates(ids)
    served = ServedTeacher(url, tokens_per_request=tokens_per_request, concurrency=1)
    parts = [slice(None)] if tokens_per_request is None else [slice(b, b + 1) for b in range(8)]
    for part in parts:  # a request of its own for each row: as the server groups them
        at_home = teacher.logprobs_at(ids[part], mask[part], scored[part], temperature=1.5)
        away = served.logprobs_at(ids[part], mask[part], scored[part], temperature=1.5)
        for name in ("ids", "logprobs", "log_tail"):
            assert torch.equal(getattr(at_home, name), getattr(away, name)), name


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"ids": [[[1, 2], [3, 4]]]}, "3 lists of ids in row 0"),
        ({"ids": [[[1], [2], [VOCAB]]]}, f"token ids in 0..{VOCAB - 1}"),
        ({"ids": [[[1], [2], [True]]]}, "token ids"),
        ({"ids": [[[1], [2, 3], [4]]]}, "equally many ids for every token"),
        ({"ids": [[[], [], []]]}, "at least one id at row 0, position 0"),
        ({"ids": 3}, "a list of 1 rows"),
        ({"ids": [[[1], [2], [3]]], "k": 4}, "k: expected none with ids"),
    ],
)
def test_a_request_with_wrong_ids_is_refused(url, changes, error):
    status, body, _ = post(url, "/v1/topk", {"prompt": [[5, 9, 14]], **changes})
    assert status == 400
    assert error in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("lie", [-1, 3])
def test_answers_about_other_ids_are_refused(teacher, url, monkeypatch, lie):
    real = teacher.logprobs_at

    def other(*args, **options):
        answers = real(*args, **options)
        ids = answers.ids.clone()
        ids[..., 0] = lie
        return answers._replace(ids=ids)

    monkeypatch.setattr(teacher, "logprobs_at", other)
    with pytest.raises(WrongAnswer, match="row 0, position 0: expected the ids of the request"):
        ServedTeacher(url).logprobs_at(
            torch.tensor([[5, 9]]), None, torch.tensor([[[7, 8], [7, 7]]])
        )


def test_vllm_is_refused_where_ids_are_to_be_scored(tmp_path):
    with vllm(peaked()) as server:
        served = ServedTeacher(server.url)
        with pytest.raises(ValueError, match=r"expected a server that .*--enable-scale-out"):
            served.logprobs_at(torch.tensor([[5, 9]]), None, torch.tensor([[[1], [2]]]))
        with pytest.raises(ValueError, match="support: expected a server that scores given ids"):
            build(tmp_path, teacher=served, support="student", divergence="reverse_kl")


def post(url, path, body, **headers):
    """(status, body, headers) without our client."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    payload = body if isinstance(body, (str, bytes)) else json.dumps(body)
    try:
        headers = {"Content-Type": "application/json"} | headers
        connection.request("POST" if body else "GET", path, payload or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_bit_of_the_answers(teacher, url, batch, temperature):
    ids, mask = batch
    client = ServedTeacher(url)
    ours, theirs = (t.topk(ids, mask, k=8, temperature=temperature) for t in (client, teacher))
    for name in ("ids", "logprobs", "log_tail"):
        got, expected = getattr(ours, name), getattr(theirs, name)
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), name
    assert ours.temperature == temperature
    assert client.vocab_size == VOCAB
    client.close()


def test_a_quantised_teacher_says_so(batch):
    quantised = load_teacher(llama(7, hidden=64), quant="int8")
    with ours(quantised) as url:
        client = ServedTeacher(url)
        assert torch.equal(client.topk(*batch, k=8).logprobs, quantised.topk(*batch, k=8).logprobs)
        assert client.identity["quantisation"] == "int8"
        client.close()


def test_many_small_requests_are_put_back_in_order(teacher, url, batch):
    ids, mask = batch
    client = pickle.loads(pickle.dumps(ServedTeacher(url, tokens_per_request=10, concurrency=3)))
    got, expected = client.topk(ids, mask, k=5), teacher.topk(ids, mask, k=5)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs)
    nothing = client.topk(ids, torch.zeros_like(mask), k=5)
    assert (nothing.ids == -1).all()
    assert (nothing.log_tail == 0).all()
    client.valid_vocab = 40
    cut = client.topk(ids, mask, k=5)
    assert torch.equal(cut.ids, expected.within(40).ids)
    client.close()


@pytest.mark.parametrize("k", [1, 5])
def test_vllms_json(batch, k):
    """From a server that is not ours, and its last position, for which vLLM has no answer."""
    ids, mask = batch
    with vllm(peaked()) as server:
        client = ServedTeacher(server.url, tokens_per_request=40)
        server.seen.clear()  # of the question at opening
        got = client.topk(ids, mask, k=k)
        body = server.seen[0][0]
        client.close()
    expected = Teacher(peaked()).topk(ids, mask, k=k)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    tail = present(expected.log_tail).clamp(min=-11.0)  # 1 − Σ p of fp32 numbers says no more
    torch.testing.assert_close(present(got.log_tail).clamp(min=-11.0), tail, rtol=0, atol=5e-2)
    assert (body["model"], body["max_tokens"], body["prompt_logprobs"]) == (MODEL, 1, k)
    assert client.vocab_size is None
    assert client.identity == {"name": MODEL, "root": "/weights"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_our_json_is_vllms(teacher, url, temperature):
    """Entry by entry what a server with all logits says, the prompt's own token included."""
    question = {"prompt": [[5, 9, 14, 3, 3], [7]], "prompt_logprobs": 3, "temperature": temperature}
    with vllm(peaked(), tempered=True) as server:
        _, expected = server.completion(question)
    status, body, _ = post(url, "/v1/completions", question | {"max_tokens": 1})
    assert status == 200
    answer = json.loads(body)
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 2, "total_tokens": 8}
    assert len(answer["choices"]) == 2
    for got, wanted in zip(answer["choices"], expected["choices"], strict=True):
        assert got["index"] == wanted["index"]
        for own, theirs in zip(got["prompt_logprobs"], wanted["prompt_logprobs"], strict=True):
            assert (own is None) == (theirs is None)
            for token in theirs or ():
                assert own[token]["rank"] == theirs[token]["rank"]
                assert own[token]["logprob"] == pytest.approx(theirs[token]["logprob"], abs=1e-5)
            assert own is None or own.keys() == theirs.keys()


@pytest.mark.slow
def test_the_same_student_from_a_url(tmp_path, teacher, url):
    here = train(tmp_path / "here", teacher=teacher, **RUN)
    there = train(tmp_path / "there", teacher=url, temperature=1.0, **RUN)
    start = torch.cat([p.flatten() for p in llama(0).parameters()])
    assert (weights(here) - weights(there)).norm() < 1e-5 * (weights(here) - start).norm()
    there.teacher.close()


def test_a_cache_built_through_the_server(tmp_path, teacher, url):
    options: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0)}
    client = ServedTeacher(url)
    here = TeacherCache.build(teacher, ragged(12), tmp_path / "here", **options)
    there = TeacherCache.build(client, ragged(12), tmp_path / "there", **options)
    assert there.manifest.shards == here.manifest.shards
    assert there.manifest.settings.teacher == here.manifest.settings.teacher
    client.close()


def test_several_clients_at_once(teacher, url, batch):
    ids, mask = batch
    expected = {k: teacher.topk(ids, mask, k=k) for k in (3, 6)}

    def ask(i):
        client = ServedTeacher(url, tokens_per_request=30)
        answers = [client.topk(ids, mask, k=3 + 3 * (i % 2)) for _ in range(3)]
        client.close()
        return answers

    with ThreadPoolExecutor(6) as pool:
        for i, answers in enumerate(pool.map(ask, range(6))):
            for got in answers:
                assert torch.equal(got.ids, expected[3 + 3 * (i % 2)].ids)


def test_tokenizers_are_compared_by_what_the_server_says(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(shipped_folder())
    other = AutoTokenizer.from_pretrained(shipped_folder())
    other.add_tokens(["<new>"])
    with ours(Teacher(llama(7, vocab=len(tokenizer)), tokenizer=tokenizer)) as url:
        client, texts = ServedTeacher(url, tokenizer=tokenizer), [{"text": "import os"}] * 2
        with pytest.raises(ValueError, match="tokenizer: expected that of LlamaForCausalLM at ht"):
            ServedTeacher(url, tokenizer=other)
        client.tokenizer = None
        with pytest.raises(ValueError, match="tokenizer: expected that of"):
            TeacherCache.build(client, texts, tmp_path / "c", k=4, tokenizer=other)
        client.close()
        options = {"model": llama(0, vocab=len(tokenizer)), "data": texts}
        build(tmp_path, teacher=url, processing_class=tokenizer, **options).teacher.close()
        with pytest.raises(ValueError, match="tokenizer: expected that of"):
            build(tmp_path, teacher=url, processing_class=other, **options)
        wider = {**options, "model": llama(0, vocab=len(tokenizer) + 8)}
        build(tmp_path, teacher=url, processing_class=tokenizer, **wider).teacher.close()
        assert "both are cut to the first" in caplog.text
        assert "Pass processing_class" not in caplog.text


def test_the_token(teacher, batch, monkeypatch):
    ids, mask = batch
    with ours(teacher, token="a secret") as url:
        assert post(url, "/health", None)[0] == 200
        status, body, _ = post(url, "/v1/topk", {"prompt": [[1]], "k": 1}, Authorization="Bearer x")
        assert (status, json.loads(body)["error"]["type"]) == (401, "Unauthorized")
        for wrong in (None, "another"):
            with pytest.raises(ValueError, match="token: expected the one that http"):
                ServedTeacher(url, token=wrong)
        ServedTeacher(url, token="a secret").topk(ids, mask, k=2)
        monkeypatch.setenv("FASTDISTILL_TOKEN", "a secret")
        assert "secret" not in repr(ServedTeacher(url).identity)
    monkeypatch.delenv("FASTDISTILL_TOKEN")
    with pytest.raises(ValueError, match="token: expected one when host is not loopback"):
        serve(teacher, host="0.0.0.0")
    for make in (lambda: ServedTeacher(url, token="word\n"), lambda: serve(teacher, token="é")):
        with pytest.raises(ValueError, match="token: expected printable ASCII") as caught:
            make()
        assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("topk", "{", 400, "body: expected JSON"),
        ("topk", "[1]", 400, "body: expected a JSON object"),
        ("topk", {"k": 2}, 400, "prompt: expected lists of token ids"),
        ("topk", {"prompt": "text", "k": 2}, 400, "prompt: expected lists of token ids"),
        ("topk", {"prompt": [[1], []], "k": 2}, 400, "prompt: expected lists of token ids"),
        ("topk", {"prompt": [[1, VOCAB]], "k": 2}, 400, r"prompt: expected token ids in 0\.\.52"),
        ("topk", {"prompt": [[1, True]], "k": 2}, 400, r"prompt: expected token ids in 0\.\.52"),
        ("topk", {"prompt": [[1] * 99], "k": 2}, 400, "prompt: expected at most 64 tokens"),
        ("topk", {"prompt": [[1]], "k": 9}, 400, r"k: expected an integer in 1\.\.8 \(max_k"),
        ("topk", {"prompt": [[1]], "k": 2, "temperature": 0}, 400, "temperature: expected a fin"),
        (
            "topk",
            {"prompt": [[1]], "k": 2, "model": "x"},
            404,
            "model: expected 'LlamaForCausalLM'",
        ),
        ("topk", " " * 80000, 413, "body: expected at most"),
        ("completions", {"prompt": [1], "max_tokens": 2}, 400, "max_tokens: expected 0 or 1"),
        ("completions", {"prompt": [1], "stream": True}, 400, "stream: expected False"),
        ("nothing", {"prompt": [1]}, 404, "/v1/nothing"),
    ],
)
def test_what_the_server_refuses(small, path, body, status, words):
    got, answer, _ = post(small, f"/v1/{path}", body)
    error = json.loads(answer)["error"]
    assert (got, error["code"]) == (status, status)
    assert re.search(words, error["message"])


@pytest.fixture(scope="module")
def small(teacher):
    with ours(teacher, max_k=8, max_tokens=64) as url:
        yield url
