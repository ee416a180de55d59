"""The clients against a real vLLM and a real llama.cpp, which `.ci/servers` starts.

vLLM computes in bf16; the reference is the same model in fp32, in this process. Errors are compared
with those of transformers in vLLM's dtype. Run with -s to see them.
"""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdistill import OpenAISampler, ServedTeacher, Teacher
from fastdistill.alignment.experiment.demo.smollm2.models import cut_student
from fastdistill.teachers.http import WrongAnswer
from fastdistill.training.samplers import SampleRequest
from helpers.present import present
from helpers.training import step_losses, train

VLLM, SCORING = os.environ.get("FASTDISTILL_VLLM"), os.environ.get("FASTDISTILL_VLLM_SCORES")
LLAMACPP, FOLDER = os.environ.get("FASTDISTILL_LLAMACPP"), os.environ.get("FASTDISTILL_SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in (VLLM, SCORING, LLAMACPP, FOLDER), reason="needs .ci/servers"),
]

K, LONGEST = 64, 510  # --max-logprobs; --max-model-len 512 counts two tokens more
END = 2  # <|im_end|>
ROUNDING = 2.0  # allowed, in errors of transformers in the same dtype
TEXTS = (
    "What is the capital of France?",
    "Name three colors of the rainbow.",
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "Water boils at 100 degrees Celsius at sea level.",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [{"input_ids": tokenizer(text, return_tensors="pt").input_ids[0]} for text in TEXTS]


@pytest.fixture(scope="module")
def batch(rows):
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=END)
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths).long()


def load(dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)


@pytest.fixture(scope="module")
def exact():
    return Teacher(load(torch.float32))


@pytest.fixture(scope="module")
def rounded():
    """transformers in the dtype in which vLLM computes."""
    return Teacher(load(getattr(torch, os.environ.get("DTYPE", "bfloat16"))))


@pytest.fixture(scope="module")
def served():
    return ServedTeacher(str(VLLM), concurrency=1, retries=2, timeout=900)


def errors_at(teacher, exact, batch, answers):
    """|log p − log p of the model in fp32| at the answers' ids: of the answers, and of teacher."""
    ids, mask = batch
    filled = mask.bool()[..., None] & (answers.ids >= 0)
    expected = exact.logprobs_at(ids, mask, answers.ids).logprobs
    own = teacher.logprobs_at(ids, mask, answers.ids).logprobs
    return [(x - expected).abs()[filled].double() for x in (answers.logprobs, own)]


def check_rounding(title, teacher, exact, batch, answers):
    measured, own = errors_at(teacher, exact, batch, answers)
    print(
        f"\n{title}, {measured.numel()} log-probabilities against fp32: mean error "
        f"{measured.mean():.2g}, largest {measured.max():.2g}; transformers in the same dtype: "
        f"{own.mean():.2g}, {own.max():.2g}"
    )
    assert measured.mean() <= ROUNDING * own.mean() + 1e-5
    assert measured.max() <= ROUNDING * own.max() + 2e-4


def test_top_k(served, rounded, exact, batch):
    ids, mask = batch
    answers = served.topk(ids, mask, k=K)
    check_rounding("vLLM, top 64", rounded, exact, batch, answers)
    tail = exact.logprobs_at(ids, mask, answers.ids).log_tail
    difference = (present(answers.log_tail).exp() - present(tail).exp()).abs()[mask.bool()]
    assert difference.max() < 0.05


def test_answers_do_not_depend_on_the_prefix_cache(served, rounded, exact, batch):
    ids, mask = batch
    row = ids[2][mask[2].bool()][None]
    first = served.topk(row, k=8)
    body = {"model": "smollm2", "prompt": row[0].tolist(), "max_tokens": 1}
    for _ in range(2):  # plain requests read and fill the cache
        request = urllib.request.Request(
            f"{VLLM}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=120).close()
    again = served.topk(row, k=8)
    assert first.ids.shape == again.ids.shape
    check_rounding("vLLM, cached prefix", rounded, exact, (row, torch.ones_like(row)), again)


def test_the_longest_row(served, rounded, exact):
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(100, 40000, (1, LONGEST + 1), generator=generator)
    longest = row[:, :LONGEST]
    answers = served.topk(longest, k=2)
    check_rounding("vLLM, 510 tokens", rounded, exact, (longest, torch.ones_like(longest)), answers)
    with pytest.raises(ValueError, match=r"input_ids: .* of at most 510 tokens"):
        served.topk(row, k=2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": K + 1}, "k: expected at most 64.*start vLLM with --max-logprobs 65"),
        ({"k": 2, "temperature": 2.0}, "temperature: expected 1"),
    ],
)
def test_what_vllm_cannot_give(served, batch, options, error):
    with pytest.raises(ValueError, match=error):
        served.topk(*batch, **options)


def test_given_ids(served, rounded, exact, batch):
    ids, mask = batch[0][:2, :5], batch[1][:2, :5]
    wanted = torch.randint(0, 49152, (*ids.shape, 6), generator=torch.Generator().manual_seed(1))
    wanted[..., 0], wanted[..., 1], wanted[0, 1] = 0, -1, -1
    scoring = ServedTeacher(str(SCORING), retries=2, timeout=900)
    answers = scoring.logprobs_at(ids, mask, wanted)
    check_rounding("vLLM, given ids", rounded, exact, (ids, mask), answers)
    assert (answers.ids == wanted).all()
    assert present(answers.log_tail)[0, 1] == 0
    with pytest.raises(ValueError, match="ids: expected at most 64"):
        scoring.logprobs_at(ids, mask, torch.arange(65).expand(*ids.shape, 65))
    with pytest.raises(ValueError, match="temperature: expected 1"):
        scoring.logprobs_at(ids, mask, wanted, temperature=2.0)
    with pytest.raises(ValueError, match=r"support: .*--enable-scale-out"):
        served.check_scores_ids("support")


def request(tokenizer, n, *, temperature, max_new_tokens=24):
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return SampleRequest(
        prompts=[prompt] * n,
        seeds=list(range(n)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0,
        ends=[END],
        vocab=49152,
        model=None,
        step=0,
    )


@pytest.mark.parametrize("url", [VLLM, LLAMACPP], ids=["vllm", "llamacpp"])
def test_samples_are_of_the_model(url, tokenizer, exact):
    """Their mean log-probability is that of samples, which is the negative entropy."""
    drawn = request(tokenizer, 6, temperature=1.0)
    sampler = OpenAISampler(str(url), retries=2, timeout=900)
    samples = sampler(drawn)
    assert sampler(drawn) == samples  # of the same seeds
    assert len({tuple(sample) for sample in samples}) == len(samples)
    gaps = []
    for prompt, sample in zip(drawn.prompts, samples, strict=True):
        tokens = torch.tensor([[*prompt, *sample]])
        with torch.no_grad():
            logits = exact.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].double()
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        gaps.append(logprobs.gather(-1, torch.tensor(sample)[:, None])[:, 0] + entropy)
    gap = torch.cat(gaps)
    error = gap.std() / len(gap) ** 0.5
    print(f"\nmean log p + entropy of {len(gap)} sampled tokens: {gap.mean():.2f} ± {error:.2f}")
    assert gap.mean().abs() < 4 * error


def test_a_run_on_vllm_equals_one_in_this_process(served, rounded, exact, rows, tmp_path):
    def losses(teacher):
        model = cut_student(load(torch.float32), [0, 10, 20, 29])
        options = {"max_steps": 20, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
        return step_losses(
            train(
                tmp_path,
                model=model,
                teacher=teacher,
                data=rows,
                k=K,
                learning_rate=1e-4,
                **options,
            )
        )

    reference = torch.tensor(losses(exact))
    own, remote = ((torch.tensor(losses(t)) - reference).abs() for t in (rounded, served))
    print(
        "\nstep, loss with the teacher in fp32, differences: vLLM, transformers in the same dtype"
    )
    for step, values in enumerate(zip(reference, remote, own, strict=True), 1):
        print("{:4d}  {:.4f}  {:.4f}  {:.4f}".format(step, *map(float, values)))
    assert len(reference) == 20
    assert reference[-1] < reference[0]
    assert remote.mean() <= ROUNDING * own.mean() + 1e-3


def test_llamacpp_is_refused_as_a_teacher():
    with pytest.raises(WrongAnswer, match=r"'llamacpp'.*fastdistill serve --teacher MODEL.gguf"):
        ServedTeacher(str(LLAMACPP))
