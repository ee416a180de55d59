"""fastdistill serve as clients of OpenAI and vLLM know such a server, lm-eval among them."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill import Teacher
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.teachers.http import ServedTeacher, requests
from helpers.served import LM_EVAL, ours
from helpers.training import VOCAB, llama, peaked

ROW = [5, 9, 14, 3, 3]


@pytest.fixture(scope="module")
def model():
    return peaked()


@pytest.fixture(scope="module")
def url(model):
    with ours(Teacher(model), name="a-name", max_k=20, max_tokens=4096) as url:
        yield url


def ask(url, path, body=None):
    """(status, value), as a strict reader of JSON sees it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST" if body else "GET", path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read(), parse_constant=pytest.fail)
    finally:
        connection.close()


def completion(url, **fields):
    return ask(url, "/v1/completions", {"prompt": [ROW], **fields})


def logprobs_of(model, row, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0].double()
    return (logits / temperature).log_softmax(-1)


# ---- log-likelihoods


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_lm_eval_asks(model, url, count):
    rows = [ROW, [7, 7]]
    status, answer = completion(url, **LM_EVAL | {"prompt": rows, "logprobs": count})
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for row, choice in zip(rows, answer["choices"], strict=True):
        truth = logprobs_of(model, row)
        tokens = [*row, int(truth[-1].argmax())]
        listed = choice["logprobs"]
        assert listed["tokens"] == [f"token_id:{t}" for t in tokens]
        assert listed["token_logprobs"][0] is listed["top_logprobs"][0] is None
        assert len(listed["token_logprobs"]) == len(listed["text_offset"]) == len(tokens)
        for t, (token, top) in enumerate(zip(tokens[1:], listed["top_logprobs"][1:], strict=True)):
            value = listed["token_logprobs"][t + 1]
            assert value == pytest.approx(truth[t, token].item(), abs=1e-5)
            best = truth[t].topk(count)
            expected = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            expected |= {token: truth[t, token].item()}
            assert top == {f"token_id:{i}": pytest.approx(p, abs=1e-5) for i, p in expected.items()}
            # How lm-eval finds out whether an answer is what greedy decoding gives.
            if count:
                assert (value == max(top.values())) == (token == truth[t].argmax())
        assert choice["prompt_logprobs"] is None


def test_texts_are_those_of_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(shipped_folder())
    row = tokenizer("import os\nimport sys")["input_ids"]
    with ours(Teacher(llama(7, vocab=len(tokenizer)), tokenizer=tokenizer)) as url:
        _, answer = completion(url, **LM_EVAL | {"prompt": row})
        (choice,) = answer["choices"]
        listed = choice["logprobs"]
        assert choice["text"].startswith("import os\nimport sys")
        assert listed["tokens"][: len(row)] == [tokenizer.decode([i]) for i in row]
        offsets = [sum(map(len, listed["tokens"][:i])) for i in range(len(row) + 1)]
        assert listed["text_offset"] == offsets
        _, answer = completion(url, prompt=row, max_tokens=0, echo=True)
        assert answer["choices"][0]["text"] == "import os\nimport sys"
        assert answer["choices"][0]["logprobs"] is None


def test_both_lists_of_one_answer(model, url):
    """Each with as many tokens as were asked for."""
    _, answer = completion(
        url, max_tokens=0, echo=True, logprobs=1, prompt_logprobs=4, temperature=2
    )
    (choice,) = answer["choices"]
    truth = logprobs_of(model, ROW, 2.0)
    assert len(choice["logprobs"]["tokens"]) == len(ROW)
    for t, token in enumerate(ROW[1:]):
        entry = choice["prompt_logprobs"][t + 1]
        order = truth[t].argsort(descending=True).tolist()
        assert set(entry) == {str(i) for i in (token, *order[:4])}
        assert entry[str(token)]["rank"] == order.index(token) + 1
        assert len(choice["logprobs"]["top_logprobs"][t + 1]) == 1 + (token != order[0])
    _, answer = completion(url, max_tokens=1, logprobs=2)
    listed = answer["choices"][0]["logprobs"]
    assert len(listed["tokens"]) == len(listed["top_logprobs"]) == 1
    assert listed["token_logprobs"][0] == max(listed["top_logprobs"][0].values())


# ---- used, or refused by name


NEUTRAL: dict[str, Any] = {
    "stream": False,
    "n": 1,
    "best_of": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "stop": None,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "suffix": None,
    "user": "me",
    "seed": 7,
    "stream_options": None,
    "top_k": -1,
}


def test_neutral_values_are_taken(url):
    assert completion(url, max_tokens=1, **NEUTRAL)[0] == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("logit_bias", {"5": 100}),
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("stream", True),
        ("stop", ["\n"]),
        ("suffix", "x"),
        ("presence_penalty", 1),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.2),
        ("guided_regex", ".*"),
        ("response_format", {"type": "json"}),
        ("use_cache", True),
        ("k", 4),
        ("echo", "yes"),
        ("echo", 1),
        ("seed", "x"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 0),
        ("temperature", -1),
        ("temperature", False),
        ("max_tokens", 16),
        ("max_tokens", None),
        ("max_tokens", True),
        ("\x1b[2J", 1),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(url, field, value):
    status, answer = completion(url, **{"max_tokens": 1, field: value})
    assert status == 400
    assert answer["error"]["message"].startswith(f"{field!r}"[1:-1] + ": expected")


@pytest.mark.parametrize("prompt", ["a text", ["a text", "two"], [[5], "a text"]])
def test_a_text_is_refused_with_the_remedy(url, prompt):
    status, answer = ask(url, "/v1/completions", {"prompt": prompt, **LM_EVAL})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert re.search("Encode text with the teacher's tokenizer", answer["error"]["message"])


def test_what_is_not_served_is_refused_with_what_is(url):
    for path, got in (("/v1/chat/completions", "POST"), ("/v1/topk", "GET")):
        status, answer = ask(url, path, {"messages": []} if got == "POST" else None)
        assert status in (404, 405)
        message = answer["error"]["message"]
        assert "/v1/completions, got" in message
        assert f"got {got} {path}" in message


def test_unknown_fields_of_the_packed_form(url):
    status, answer = ask(url, "/v1/topk", {"prompt": [ROW], "k": 2, "top_p": 0.9})
    assert (status, answer["error"]["param"]) == (400, "top_p")


def test_a_question_about_a_prompt_needs_no_max_tokens(url):
    for more in ({"prompt_logprobs": 2}, {"echo": True, "logprobs": 1}):
        assert completion(url, **more)[1]["usage"]["completion_tokens"] == 1


# ---- numbers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/topk"])
@pytest.mark.parametrize(
    "temperature", [1e-45, 1e-300, 5e-324, 1e-38, 2e-38, 1e-37, 1e39, 10**400, 1e999, "2"]
)
def test_a_temperature_gives_numbers_or_is_refused(path, temperature):
    body = {"prompt": [[5, 6, 7]], "temperature": temperature, "max_tokens": 1}
    body |= {"k": 2} if "topk" in path else {"prompt_logprobs": 2}
    body.pop("max_tokens" if "topk" in path else "k", None)
    model = peaked()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    with ours(Teacher(model)) as url:
        status, answer = ask(url, path, body)
    assert status == 400
    assert answer["error"]["message"].startswith("temperature: expected")


def test_a_teacher_that_computes_nan_is_no_bad_request():
    teacher = Teacher(llama(7))
    with torch.no_grad():
        teacher.model.get_parameter("lm_head.weight")[3] = float("nan")
    with ours(teacher) as url:
        status, answer = completion(url, prompt_logprobs=2)
        assert status == 500
        assert "the teacher failed: NotNumbers: expected numbers" in answer["error"]["message"]
        assert ask(url, "/v1/topk", {"prompt": [ROW], "k": 2})[0] == 500


def test_tokens_without_a_probability_are_written_as_numbers():
    model = peaked()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    with ours(Teacher(model)) as url:
        status, answer = completion(url, prompt_logprobs=VOCAB, max_tokens=0, temperature=1e-25)
        assert status == 200
        assert "-9999" in json.dumps(answer)


# ---- limits


def test_a_large_answer_is_refused_with_the_packed_form_named(url, monkeypatch):
    monkeypatch.setattr(requests, "MAX_ENTRIES", 100)
    body = {"prompt": [[1] * 20, [2] * 5], "prompt_logprobs": 4}
    status, answer = ask(url, "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (413, 413)
    assert re.search(r"at most 100 .* got 125 .25 tokens × 5.*/v1/topk", answer["error"]["message"])
    assert completion(url, **LM_EVAL | {"logprobs": 20, "prompt": [[1] * 20]})[0] == 413
    assert ask(url, "/v1/completions", body | {"prompt": [[1] * 20]})[0] == 200
    assert ServedTeacher(url).topk(torch.ones(5, 5, dtype=torch.int64), k=4).ids.shape == (5, 5, 4)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/topk"])
def test_a_row_longer_than_the_positions(model, url, path):
    most = model.config.max_position_embeddings
    body = {"k": 2} if "topk" in path else {"prompt_logprobs": 2}
    status, answer = ask(url, path, body | {"prompt": [ROW, [3] * (most + 1)]})
    assert status == 400
    assert f"rows of at most {most} tokens" in answer["error"]["message"]
    assert f"got {most + 1} in row 1. Cut rows to max_length={most}" in answer["error"]["message"]


# ---- models


def test_models_are_listed_and_retrieved(url, model):
    _, listed = ask(url, "/v1/models")
    status, one = ask(url, "/v1/models/a-name")
    assert (status, one) == (200, listed["data"][0])
    assert one["max_model_len"] == model.config.max_position_embeddings
    status, answer = ask(url, "/v1/models/another/one")
    assert (status, answer["error"]["type"]) == (404, "NotFoundError")
    with ours(Teacher(model), name="org/name", token="x") as guarded:
        assert ask(guarded, "/v1/models/org/name")[0] == 401
    with ours(Teacher(model), name="org/name") as slashed:
        assert ask(slashed, "/v1/models/org/name")[1]["id"] == "org/name"


def test_where_the_model_lies_is_not_told(tmp_path, monkeypatch):
    folder = tmp_path / "in" / "a-folder"
    llama(7).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    for path in (folder, "in/a-folder"):
        with ours(Teacher(str(path))) as url:
            _, listed = ask(url, "/v1/models")
            assert listed["data"][0]["id"] == "a-folder"
            assert str(tmp_path) not in json.dumps(listed)
            assert "in/" not in json.dumps(listed)
