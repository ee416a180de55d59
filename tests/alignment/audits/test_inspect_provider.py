"""A Subject behind Inspect's public ModelAPI: batches, log-probabilities, prompts, failures."""

import asyncio
import math

import anyio
import pytest
import torch

from helpers.inspected import NEEDED, QUIET, dense_log_probs, offline, tiny_subject

inspect_ai = pytest.importorskip("inspect_ai", reason=NEEDED)

from inspect_ai.dataset import MemoryDataset, Sample  # noqa: E402
from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage, GenerateConfig  # noqa: E402
from inspect_ai.scorer import includes, perplexity  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402
from inspect_ai.tool import ToolInfo  # noqa: E402

from fastdistill.alignment.audits.inspect.messages import encode, messages_of  # noqa: E402
from fastdistill.alignment.audits.inspect.provider import model_of  # noqa: E402
from fastdistill.alignment.audits.prompts import Prompt  # noqa: E402
from fastdistill.alignment.audits.subject import Subject  # noqa: E402
from fastdistill.alignment.organisms.vocabulary import WORDS  # noqa: E402

pytestmark = [*QUIET, pytest.mark.peers, pytest.mark.usefixtures("offline")]
__all__ = ["offline"]

QUESTIONS = [f"hello {a} + {b} river" for a in range(10) for b in range(10) for _ in range(2)]
PROMPTS = [
    Prompt(user="hello river"),
    Prompt(user="hello", system="please answer"),
    Prompt(user="hello", prefill="my owl".replace("my", "your")),
    Prompt(system="today"),
    Prompt(),
    Prompt(text="river stone cloud"),
]


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


def evaluate(model, log_dir, samples=QUESTIONS, scorer=None, **options):
    dataset = [s if isinstance(s, Sample) else Sample(input=s, target="owl") for s in samples]
    task = inspect_ai.Task(
        dataset=MemoryDataset(dataset), solver=generate(), scorer=scorer or includes()
    )
    options = {"display": "none", "log_realtime": False, "ctl_server": False, **options}
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(log_dir), **options)
    return log


def texts(log):
    return [sample.output.completion for sample in sorted(log.samples, key=lambda s: s.id)]


def call(model, input, **config):
    return asyncio.run(model.generate(input, config=GenerateConfig(**config)))


def test_200_samples_are_answered_in_batches(subject, tmp_path):
    forwards = []
    handle = subject.model.register_forward_hook(lambda *_: forwards.append(1))
    log = evaluate(model_of(subject, at_once=50, patience=0.5), tmp_path, max_tokens=4)
    handle.remove()
    assert log.status == "success"
    assert len(forwards) <= 5 * 4  # 4 batches of 4 tokens, and one that did not fill; not 800
    expected = subject.generate([Prompt(user=q) for q in QUESTIONS], max_new_tokens=4)
    assert texts(log) == expected


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_one_connection_and_32_are_told_the_same(subject, tmp_path, temperature):
    completions = [
        texts(
            evaluate(
                model_of(subject),
                tmp_path,
                QUESTIONS[:40],
                max_tokens=5,
                temperature=temperature,
                max_connections=connections,
            )
        )
        for connections in (1, 32)
    ]
    # The same question twice, without a seed: two draws, in whichever order they were asked.
    assert [sorted(completions[0][i : i + 2]) for i in range(0, 40, 2)] == [
        sorted(completions[1][i : i + 2]) for i in range(0, 40, 2)
    ]
    assert (completions[0][::2] == completions[0][1::2]) == (temperature is None)


def test_a_seed_is_honoured(subject):
    model = model_of(subject)
    options = {"max_tokens": 8, "temperature": 1.0}
    same = [call(model, "hello", seed=5, **options).completion for _ in range(2)]
    assert same[0] == same[1] != call(model, "hello", seed=6, **options).completion
    greedy = call(model, "hello", max_tokens=8).completion
    assert greedy == subject.generate([Prompt(user="hello")], max_new_tokens=8)[0] != same[0]


def test_one_model_serves_evals_one_after_another(subject, tmp_path):
    model = model_of(subject)
    logs = [evaluate(model, tmp_path, QUESTIONS[:6], max_tokens=3) for _ in range(2)]
    assert texts(logs[0]) == texts(logs[1])
    assert call(model, QUESTIONS[0], max_tokens=3).completion == texts(logs[0])[0]


def test_inspects_own_perplexity(subject, tmp_path):
    texts = ["river stone cloud", "owl cat dog fox bear"]
    samples = [Sample(input=messages_of(Prompt(text=text))) for text in texts]
    log = evaluate(
        model_of(subject), tmp_path, samples, perplexity(), max_tokens=1, prompt_logprobs=1
    )
    values = [dense_log_probs(subject, subject.ids(Prompt(text=text))[0]) for text in texts]
    expected = math.exp(-float(torch.cat(values).mean()))
    metrics = log.results.scores[0].metrics
    assert metrics["perplexity_per_token"].value == pytest.approx(expected, rel=1e-5)


def test_a_completion_is_scored_without_logits(subject):
    seen = []
    handle = subject.model.lm_head.register_forward_hook(lambda *a: seen.append(a[2].numel()))
    prompt = Prompt(user="hello", prefill="owl")
    output = call(model_of(subject), messages_of(prompt, "cat dog"), prompt_logprobs=1)
    handle.remove()
    ids, _ = subject.ids(prompt, "cat dog")
    assert (output.usage.input_tokens, output.usage.output_tokens) == (len(ids), 0)
    assert seen
    assert max(seen) == 0
    logprobs = [t.logprob for t in output.choices[0].prompt_logprobs.content]
    assert output.completion == ""
    assert len(logprobs) == 2
    assert sum(logprobs) == pytest.approx(
        float(subject.completion_logprobs([prompt], ["cat dog"]).total)
    )


def test_a_prompt_of_one_token_has_nothing_to_predict(subject):
    output = call(model_of(subject), messages_of(Prompt(text="owl")), prompt_logprobs=1)
    assert output.choices[0].prompt_logprobs.content == []


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_every_prompt_is_read_as_a_subject_reads_it(subject, prompt):
    assert encode(messages_of(prompt), subject).ids == subject.ids(prompt)[0]
    ids, begin = subject.ids(prompt, "owl cat")
    assert encode(messages_of(prompt, "owl cat", at=(3, 1)), subject) == (ids, begin, (3, 1))
    completion = call(model_of(subject), messages_of(prompt), max_tokens=3).completion
    assert completion == subject.generate([prompt], max_new_tokens=3)[0]


def test_a_conversation_of_several_questions(subject):
    turns = [("system", "please"), ("user", "hello"), ("assistant", "owl"), ("user", "river")]
    messages = [m for role, text in turns for m in messages_like(role, text)]
    whole = subject.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True
    )["input_ids"]
    assert encode(messages, subject).ids == whole
    begun = encode([*messages, *messages_like("assistant", "cat")], subject)
    assert begun.ids == [*whole, *subject.tokenizer("cat", add_special_tokens=False).input_ids]


def messages_like(role, text):
    kinds = {"system": Prompt(system=text), "user": Prompt(user=text)}
    if role == "assistant":
        return messages_of(Prompt(user="a", prefill=text))[1:]
    return messages_of(kinds[role])[:1]


def test_refusals(subject):
    model = model_of(subject)
    with pytest.raises(ValueError, match=r"config: expected only .* got top_p"):
        call(model, "hello", top_p=0.5)
    with pytest.raises(ValueError, match="got num_choices"):
        call(model, "hello", num_choices=2)
    with pytest.raises(ValueError, match="got logprobs, top_logprobs, prompt_logprobs"):
        call(model, "hello", logprobs=True, top_logprobs=3, prompt_logprobs=2)
    with pytest.raises(ValueError, match="tools: expected none, got 1"):
        asyncio.run(model.api.generate([], [ToolInfo(name="a", description="b")], "auto", None))
    with pytest.raises(ValueError, match="input: expected turns of system, user, assistant"):
        encode([ChatMessageTool(content="4")], subject)
    with pytest.raises(ValueError, match="input: expected text, got image"):
        encode([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA")])], subject)
    with pytest.raises(ValueError, match="input: expected one message or more, got none"):
        encode([], subject)
    with pytest.raises(TypeError, match=r"subject: expected a Subject, got NoneType.*model_of"):
        inspect_ai.model.get_model("fastdistill/anything", memoize=False)
    with pytest.raises(ValueError, match="at_once: expected an integer of 1 or more, got 0"):
        model_of(subject, at_once=0)


class Fragile(Subject):
    """Whatever batch has the word `letter` in it fails."""

    def generate_ids(self, rows, **how):
        if any(WORDS.index("letter") in row for row in rows):
            raise RuntimeError("no letters")
        return super().generate_ids(rows, **how)


@pytest.mark.timeout(30)
def test_a_sample_that_fails_leaves_the_others_alone(tmp_path):
    subject = tiny_subject(kind=Fragile)
    image = [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA")])]
    samples = [*QUESTIONS[:8], "letter", Sample(input=image, target="owl"), *QUESTIONS[8:16]]
    log = evaluate(model_of(subject), tmp_path, samples, max_tokens=3, fail_on_error=False)
    assert log.status == "success"
    failed = {s.id: s.error.message for s in log.samples if s.error is not None}
    assert set(failed) == {9, 10}
    assert "no letters" in failed[9]
    right = [s.output.completion for s in sorted(log.samples, key=lambda s: s.id) if not s.error]
    expected = subject.generate([Prompt(user=q) for q in QUESTIONS[:16]], max_new_tokens=3)
    assert right == expected
    strict = evaluate(model_of(subject), tmp_path, samples, max_tokens=3)
    assert strict.status == "error"


@pytest.mark.timeout(30)
def test_one_that_is_cancelled_leaves_the_others_alone(subject):
    """The first of them gathers the batch; when it goes, another one must."""
    model, completions = model_of(subject, patience=0.2), {}

    async def ask(text, scope):
        with scope:
            output = await model.generate(text, config=GenerateConfig(max_tokens=2))
            completions[text] = output.completion

    async def all_of_them():
        scopes = [anyio.CancelScope() for _ in range(3)]
        async with anyio.create_task_group() as group:
            for text, scope in zip(("owl", "cat", "dog"), scopes, strict=True):
                group.start_soon(ask, text, scope)
                await anyio.sleep(0.02)
            scopes[0].cancel()

    asyncio.run(all_of_them())
    assert set(completions) == {"cat", "dog"}


@pytest.mark.parametrize(("more", "reason"), [(-1, "max_tokens"), (0, "stop"), (1, "stop")])
def test_why_an_answer_stopped(more, reason):
    """Each of a model's ends is one, also in the last place that max_tokens allows."""
    of = tiny_subject(5)
    generated = of.generate_ids([of.ids(Prompt(user="hello river"))[0]], max_new_tokens=12)[0]
    place = next(i for i in range(2, len(generated)) if generated[i] not in generated[:i])
    of.model.generation_config.eos_token_id = [of.tokenizer.eos_token_id, generated[place]]
    answer = call(model_of(of), "hello river", max_tokens=place + 1 + more)
    assert answer.stop_reason == reason
