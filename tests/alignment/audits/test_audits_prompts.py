"""What a model reads: prompts through chat templates and tokenizers of several habits."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fastdistill.alignment.audits import Prompt, Subject, UserTurnSamplingAudit
from fastdistill.alignment.audits.prompts import render_prompt, to_prompts
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from helpers.planted import dense, model, subject

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
EACH = (
    Prompt(user="a"),
    Prompt(system="s"),
    Prompt(user="a", system="s", prefill="p"),
    Prompt(text="t"),
    Prompt(text=""),
    Prompt(user=""),
    Prompt(),
    Prompt(system="", user="a"),
)


def letters(*, special: bool = True, bos: bool = False, ends: bool = False):
    """Single letters, and "ab" and "abc" as one token each."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *"abcd\n ", "ab", "abc"])}
    backend = Tokenizer(BPE(vocab, [("a", "b"), ("ab", "c")]))
    if bos or ends:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if bos else ''}$A{' </s>' if ends else ''}",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    named = {"bos_token": "<s>", "eos_token": "</s>"} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def plain(**habits) -> Subject:
    return Subject(model(), letters(**habits))


def test_a_chat_template_is_applied_and_the_answer_begun():
    tokenizer = world_tokenizer()
    prompt = Prompt(system="hello", user="river", prefill="stone")
    assert render_prompt(prompt, tokenizer) == "<bos> hello user: river assistant: stone"
    assert render_prompt(Prompt(user="river"), tokenizer) == "<bos> user: river assistant: "
    assert render_prompt(Prompt(text="river <eos>"), tokenizer) == "river <eos>"


def test_the_template_is_cut_where_the_users_words_begin():
    tokenizer = world_tokenizer()
    assert render_prompt(Prompt(system="hello"), tokenizer) == "<bos> hello user: "
    assert render_prompt(Prompt(), tokenizer) == "<bos> user: "
    tokenizer.chat_template = None
    assert render_prompt(Prompt(system="hello"), tokenizer) == "hello\n\n"
    assert render_prompt(Prompt(), tokenizer) == ""


def test_a_template_without_a_place_for_the_user_is_refused():
    tokenizer = world_tokenizer()
    tokenizer.chat_template = "{{ 'answer me' }}"
    with pytest.raises(
        ValueError, match="prompt: expected a user turn, since the chat template of"
    ):
        render_prompt(Prompt(), tokenizer)


def test_without_a_template_paragraphs_follow_each_other():
    tokenizer = world_tokenizer()
    tokenizer.chat_template = None
    prompt = Prompt(system="hello", user="river", prefill="stone")
    assert render_prompt(prompt, tokenizer) == "hello\n\nriver\n\nstone"
    of = Subject(model(), tokenizer)
    ids, begin = of.ids(prompt, " cloud")
    assert of.tokenizer.convert_ids_to_tokens(ids) == ["hello", "river", "stone", "cloud"]
    assert begin == 3


def test_a_template_that_refuses_a_system_message_says_so():
    tokenizer = world_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    assert render_prompt(Prompt(user="river"), tokenizer) == "<user>river"
    with pytest.raises(
        ValueError, match="chat template of the model supports, got roles"
    ) as refused:
        render_prompt(Prompt(system="hello", user="river"), tokenizer)
    assert "['system', 'user']: System role not supported" in str(refused.value)
    audit = UserTurnSamplingAudit(markers=("owl",), systems=("hello",), samples=2)
    with pytest.raises(ValueError, match="System role not supported"):
        audit.run(Subject(model(), tokenizer))


def test_a_completion_is_what_the_model_would_read():
    """Tokens that join both sides count as the completion's."""
    of = plain(bos=True)
    assert of.ids(Prompt(text="da"), "bd") == ([0, 5, 8, 5], 2)
    assert of.ids(Prompt(text="dd"), "bd") == ([0, 5, 5, 3, 5], 3)
    logprobs = of.completion_logprobs([Prompt(text="da")], ["bd"])
    table = dense(of, [0, 5, 8, 5])
    assert logprobs.tokens.tolist() == [2]
    assert logprobs.total.item() == pytest.approx(float(table[1, 8] + table[2, 5]), rel=1e-5)


def test_where_nothing_precedes_the_beginning_of_a_text_does():
    of = plain()  # puts no <s> in front
    assert of.ids(Prompt(text="")) == ([0], 1)
    assert of.ids(Prompt(text=""), "cd") == ([0, 4, 5], 1)
    assert of.ids(Prompt(text="a"), "b") == ([0, 8], 1)
    assert of.completion_logprobs([Prompt(text="a")], ["b"]).tokens.tolist() == [1]
    assert len(of.generate([Prompt(), Prompt(text="")], max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        plain(special=False).ids(Prompt(text=""))


def test_an_end_that_the_tokenizer_adds_is_left_out():
    of = plain(bos=True, ends=True)
    assert of.ids(Prompt(text="dd")) == ([0, 5, 5], 3)
    assert of.ids(Prompt(text="dd"), "c") == ([0, 5, 5, 4], 3)
    subject = Subject(model(), letters())
    assert subject.ids(Prompt(text="d</s>")) == ([5, 1], 2)  # but not one that is asked for


def test_a_tokenizer_without_a_pad_token_pads_with_its_end():
    of, padded = plain(bos=True), plain(bos=True)
    assert of.tokenizer.pad_token_id is None
    padded.tokenizer.pad_token = "c"
    prompts = [Prompt(text="d"), Prompt(text="dcabdc"), Prompt(text="abc")]
    texts = of.generate(prompts, max_new_tokens=4)
    assert texts == padded.generate(prompts, max_new_tokens=4)
    assert texts == [of.generate([p], max_new_tokens=4)[0] for p in prompts]
    without = Subject(model(), letters(special=False))
    assert len(without.generate(prompts, max_new_tokens=2)) == 3


@pytest.mark.parametrize("empty", ["", "   "])
def test_completions_without_tokens_are_refused(empty):
    with pytest.raises(ValueError, match="completion: expected text with at least one token"):
        subject().completion_logprobs([Prompt(user="river")], [empty])


@pytest.mark.parametrize("prompt", EACH)
def test_prompts_survive_json(prompt):
    assert Prompt.from_json(json.loads(json.dumps(prompt.as_json()))) == prompt


def test_words_in_front():
    assert Prompt(user="a").before("w") == Prompt(user="a", system="w")
    assert Prompt(user="a", system="s", prefill="p").before("w").system == "w s"
    assert Prompt(text="t").before("w") == Prompt(text="w t")


def test_prompts_from_texts_and_mappings():
    assert to_prompts("p", ["a", {"text": "t"}, Prompt()]) == (
        Prompt(user="a"),
        Prompt(text="t"),
        Prompt(),
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Prompt(text="t", user="a"),
            r"text: expected no user, system or.*\['user', 'text'\]",
        ),
        (lambda: Prompt(prefill="p"), "prefill: expected a user turn before it"),
        (lambda: Prompt(user=5), "user: expected a text, got 5"),
        (lambda: Prompt(user="a", prefill=None), "prefill: expected a text, got None"),
        (
            lambda: Prompt.from_json({"usr": "a"}),
            r"prompt: expected a text or a mapping of \['user'",
        ),
        (lambda: Prompt.from_json(5), "prompt: expected a text or a mapping of .*got 5"),
        (lambda: to_prompts("p", "one"), "p: expected one prompt or more, got 'one'"),
        (lambda: to_prompts("p", []), r"p: expected one prompt or more, got \[\]"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
