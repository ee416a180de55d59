"""Recorded answers of vLLM 0.32 and llama.cpp b11549 (SmolLM2-135M-Instruct), replayed.

The prompt is "The capital of France is Paris": ids 504, 3575, 282, 4649, …
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill import ServedTeacher
from fastdistill.teachers.http import WrongAnswer
from fastdistill.teachers.http.wire_format import read_choices
from helpers.present import present
from helpers.served import VLLM, vllm

FOLDER = Path(__file__).parents[2] / "golden" / "servers"
ROWS = torch.tensor([[504, 3575, 282, 4649], [504, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
PROMPTS = [[504, 3575, 282, 4649, 4649], [504, 504]]  # as sent: with one more token each


def recorded(name) -> tuple[int, Any]:
    content = json.loads((FOLDER / f"{name}.json").read_text())
    return content.get("status", 200), content.get("body", content)


def body(name) -> bytes:
    return json.dumps(recorded(name)[1]).encode()


@contextmanager
def replay(answers, models="vllm-0.32.0-models", scores="vllm-0.32.0-scores-disabled"):
    """A server with a recorded list of models; answers(request body) names what it replays.

    `scores` names the replies to the requests that score given ids, one after the other."""
    names = iter([scores] if isinstance(scores, str) else scores)

    class Replay(VLLM):
        def completion(self, body):
            return recorded(answers(body))

        def scores(self, body):
            return recorded(next(names))

    with vllm(None, kind=Replay) as server:
        server.listed = recorded(models)[1]["data"][0]
        yield server.url


def by_prompt(body):
    # The first, short row is one of the client's own, of which nothing was recorded.
    if body["prompt"] != PROMPTS:
        return "vllm-0.32.0-too-many"
    tempered = body["temperature"] != 1
    return f"vllm-0.32.0-prompt_logprobs{'-T2' if tempered else ''}"


def test_no_entry_at_the_first_position_and_the_prompts_own_token_as_one_more():
    with replay(by_prompt) as url:
        served = ServedTeacher(url)
        answers = served.topk(ROWS, MASK, k=2)
    ids = [[29, 28], [282, 2240], [260, 4649], [314, 28]]
    assert answers.ids[0].tolist() == ids
    assert answers.ids[1, 0].tolist() == [29, 28]
    assert (answers.ids[1, 1:] == -1).all()
    expected = [-0.8654828071594238, -2.65324068069458]
    assert answers.logprobs[0, 0].tolist() == pytest.approx(expected, abs=1e-7)
    tail = math.log(1 - sum(map(math.exp, expected)))
    assert float(present(answers.log_tail)[0, 0]) == pytest.approx(tail, rel=1e-6)


def test_the_temperature_has_no_effect_on_them():
    plain, other = (recorded(f"vllm-0.32.0-prompt_logprobs{n}")[1] for n in ("", "-T2"))
    first, second = (x["choices"][0]["prompt_logprobs"] for x in (plain, other))
    assert first == second


def test_raw_logits_are_refused_by_name():
    def raw(body):
        return "vllm-0.32.0-raw_logits" if body["prompt"] == PROMPTS[:1] else by_prompt(body)

    with replay(raw) as url, pytest.raises(WrongAnswer, match="--logprobs-mode"):
        ServedTeacher(url).topk(ROWS[:1], k=2)


def test_a_row_without_the_added_token_has_no_answer_at_its_end():
    with pytest.raises(WrongAnswer, match="expected prompt_logprobs with 2 entries"):
        read_choices(body("vllm-0.32.0-one-token"), [[504, 504]], 2, 1.0, "url")


@pytest.mark.parametrize(
    ("name", "listed", "k", "length", "error"),
    [
        ("too-many", True, 65, 4, "start vLLM with --max-logprobs 65"),
        ("outside", True, 2, 4, "Token id 49152 is out of vocabulary"),
        ("too-long", True, 2, 511, "input_ids: .* of at most 510 tokens"),
        ("longest", True, 2, 512, "input_ids: .* of at most 510 tokens"),
        ("longest", False, 2, 512, "input_ids: .* of at most 510 tokens"),
    ],
)
def test_refusals_name_the_argument(name, listed, k, length, error):
    def answers(body):
        return by_prompt(body) if k == 2 and len(body["prompt"][0]) == 8 else f"vllm-0.32.0-{name}"

    with replay(answers) as url:
        served = ServedTeacher(url)
        if not listed:
            served.listing = replace(served.listing, max_model_len=None)
        with pytest.raises(ValueError, match=error):
            served.topk(torch.full((1, length), 7), k=k)


SCORED = torch.tensor([[[29, 28, 29], [282, 2240, 0], [260, 4649, -1], [314, -1, 314]]])
AS_SENT = torch.tensor([[[29, 28, -1], [282, 2240, 0], [260, 4649, -1], [314, -1, -1]]])
EXPECTED = [
    [-0.833072, -2.583072, -math.inf],
    [-0.335601, -2.335601, -13.648101],
    [-2.165602, -2.415602, -math.inf],
    [-0.472524, -math.inf, -math.inf],
]
PROBE = "vllm-0.32.0-scores-one"


def test_vllm_scores_given_ids():
    with replay(by_prompt, scores=[PROBE, "vllm-0.32.0-scores"]) as url:
        answers = ServedTeacher(url).logprobs_at(ROWS[:1], None, SCORED)
    expected = torch.tensor(EXPECTED)
    torch.testing.assert_close(answers.logprobs[0], expected)
    assert torch.equal(answers.ids, AS_SENT)
    tail = torch.log1p(-expected.double().exp().sum(-1)).float()
    torch.testing.assert_close(present(answers.log_tail)[0], tail)


@pytest.mark.parametrize(
    ("scores", "error"),
    [
        ("scores-disabled", "ids: expected a server that .* disabled.*--enable-scale-out"),
        ("scores-no-runner", "ids: expected a server that scores given ids.*V2 model runner"),
        ("scores-too-many", "ids: expected at most 64.*start vLLM with --max-logprobs 3"),
        ("scores-outside", "out-of-vocab token ids"),
        ("scores-too-long", "input_ids: .* of at most 62 tokens"),
        ("scores-one", r"expected prompt_token_id_logprobs with fp32 of shape \[4, 3\]"),
        ("token_ids", "expected prompt_token_id_logprobs"),
    ],
)
def test_refusals_of_given_ids(scores, error):
    first = [] if scores in ("scores-disabled", "scores-no-runner") else [PROBE]
    with replay(by_prompt, scores=[*first, f"vllm-0.32.0-{scores}"]) as url:
        served = ServedTeacher(url)
        served.listing = replace(served.listing, max_model_len=None)
        length = 63 if scores == "scores-too-long" else 4
        row = torch.full((1, length), 7)
        with pytest.raises(ValueError, match=error):
            served.logprobs_at(row, None, SCORED[:, :1].expand(1, length, 3))


def test_llamacpp_is_refused_by_name():
    with (
        replay(
            lambda body: "llamacpp-b11549-completions-prompt_logprobs", "llamacpp-b11549-models"
        ) as url,
        pytest.raises(WrongAnswer, match=r"'llamacpp'.*fastdistill serve --teacher MODEL.gguf"),
    ):
        ServedTeacher(url)
