"""On-policy completions from outside: a function, or a server's token ids."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastdistill import OpenAISampler
from fastdistill.teachers.http import WrongAnswer
from fastdistill.training.on_policy import sample
from fastdistill.training.samplers import SampleRequest
from helpers.served import VLLM, vllm
from helpers.training import VOCAB, build, llama, ragged, train, weights

GOLDEN = Path(__file__).parents[1] / "golden" / "servers"
RUN = {"lmbda": 1.0, "max_new_tokens": 4, "max_steps": 2, "check_signal": False}


def as_the_student_samples(request):
    """The completions that the student in this process samples."""
    rows = [{"input_ids": torch.tensor(prompt)} for prompt in request.prompts]
    trainer = as_the_student_samples.trainer  # type: ignore[attr-defined]
    batch = trainer.data_collator(
        [{**row, "labels": torch.full_like(row["input_ids"], -100)} for row in rows]
    )
    options = {"pad_id": 0, "ends": request.ends, "vocab": None, "synced": False}
    drawn = sample(request.model, batch, config=trainer.args, step=request.step, **options)
    return [
        ids[labels != -100].tolist()
        for ids, labels in zip(drawn["input_ids"], drawn["labels"], strict=True)
    ]


def test_a_sampler_replaces_the_students_own_sampling(tmp_path):
    own = train(tmp_path, **RUN)
    trainer = build(tmp_path, trainer={"sampler": as_the_student_samples}, **RUN)
    as_the_student_samples.trainer = trainer  # type: ignore[attr-defined]
    trainer.train()
    assert torch.equal(weights(trainer), weights(own))


@pytest.mark.parametrize(
    ("sampler", "error"),
    [
        (lambda request: [[1]], "sampler: expected a list of 12 completions, one for each prompt"),
        (lambda request: [[5] * 5] * 12, "sampler: expected at most 4 token ids in completion 0"),
        (lambda request: [[5, VOCAB]] * 12, r"sampler: expected ids in 0\.\.52 in completion 0"),
        (lambda request: [["a"]] * 12, r"sampler: expected ids in 0\.\.52"),
    ],
)
def test_wrong_completions_are_refused(tmp_path, sampler, error):
    with pytest.raises(ValueError, match=error):
        train(tmp_path, trainer={"sampler": sampler}, **RUN)


def test_a_sampler_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sampler: expected None with lmbda=0"):
        build(tmp_path, trainer={"sampler": lambda request: []})
    with pytest.raises(TypeError, match="sampler: expected a function"):
        build(tmp_path, trainer={"sampler": "vllm"}, lmbda=1.0)


class Sampling(VLLM):
    """Answers with token ids that depend on the prompt and the seed; the third ends the text."""

    with_ids = True

    def completion(self, body):
        first = (sum(body["prompt"]) + body["seed"]) % (VOCAB - 5) + 3
        ids = [first, 7, *body["stop_token_ids"][:1], 9][: body["max_tokens"]]
        token_ids = ids if self.with_ids else None
        choice = {"index": 0, "text": "…", "token_ids": token_ids, "finish_reason": "stop"}
        return 200, {"object": "text_completion", "choices": [choice]}


def test_a_server_samples(tmp_path):
    steps = []
    with vllm(None, kind=Sampling) as server:
        sampler = OpenAISampler(server.url, before=lambda request: steps.append(request.step))
        trainers = [train(tmp_path, trainer={"sampler": sampler}, **RUN) for _ in range(2)]
        seen = [body for body, _ in server.seen]
    assert steps == [0, 1] * 2
    assert torch.equal(*map(weights, trainers))
    assert (weights(trainers[0]) != weights(build(tmp_path))).any()
    assert len(seen) == 4 * 12
    assert len({body["seed"] for body in seen}) == 24  # of rows and steps, the same in both runs
    assert seen[0]["return_token_ids"] is True
    assert seen[0]["max_tokens"] == 4
    assert all(isinstance(token, int) for body in seen for token in body["prompt"])
    # Otherwise vLLM takes them from generation_config.json.
    assert seen[0]["top_k"] == -1
    assert seen[0]["min_p"] == 0
    assert seen[0]["repetition_penalty"] == 1


REQUEST = SampleRequest(
    prompts=[[1, 4093, 198]],
    seeds=[11],
    max_new_tokens=40,
    temperature=0.7,
    top_p=0.9,
    ends=[2],
    vocab=49152,
    model=None,
    step=0,
)


@contextmanager
def replay(name, listed):
    """A sampler of a server that sends a recorded answer, and the requests it sends."""
    content = json.loads((GOLDEN / f"{name}.json").read_text())

    class Replay(VLLM):
        def completion(self, body):
            return content["status"], content["body"]

    with vllm(None, kind=Replay) as server:
        server.listed = json.loads((GOLDEN / f"{listed}.json").read_text())
        server.listed = server.listed.get("body", server.listed)["data"][0]
        yield OpenAISampler(server.url), server.seen


def test_token_ids_of_vllm():
    with replay("vllm-0.32.0-token_ids", "vllm-0.32.0-models") as (sampler, _):
        (tokens,) = sampler(REQUEST)
        assert len(tokens) == 40
        assert tokens[:4] == [60, 344, 370, 284]
        # finish_reason "length", as with max_new_tokens in --override-generation-config
        with pytest.raises(WrongAnswer, match=r"expected 64 tokens .* --override-generation-conf"):
            sampler(REQUEST._replace(max_new_tokens=64))


def test_token_ids_of_llamacpp():
    with replay("llamacpp-b11549-native-tokens", "llamacpp-b11549-models") as (sampler, seen):
        (tokens,) = sampler(REQUEST)
    assert tokens == [504, 3575, 282, 4649, 314, 7042, 28, 3575, 282, 4649, 30, 2]
    (body, _) = seen[0]
    assert body["n_predict"] == 40
    assert body["samplers"] == ["temperature", "top_p"]  # its own have top_k 40 and min_p 0.05
    assert body["seed"] == 11


def test_llamacpp_refuses_a_row_that_is_too_long():
    with (
        replay("llamacpp-b11549-native-too-long", "llamacpp-b11549-models") as (sampler, _),
        pytest.raises(ValueError, match="exceeds the available context size"),
    ):
        sampler(REQUEST)


def test_a_server_without_token_ids_is_refused(tmp_path):
    with vllm(None, kind=Sampling) as server:
        server.with_ids = False
        sampler = OpenAISampler(server.url)
        with pytest.raises(WrongAnswer, match="expected token_ids in the choice"):
            train(tmp_path, trainer={"sampler": sampler}, **RUN)


def test_completions_end_at_the_first_end_token(tmp_path):
    ends = llama(0).generation_config.eos_token_id
    trainer = build(tmp_path, trainer={"sampler": lambda request: [[9, ends, 9, 9]] * 12}, **RUN)
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in ragged()]
    trainer.train_dataset = rows
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    labels = batches[0]["labels"]
    assert ((labels != -100).sum(-1) == 2).all()
