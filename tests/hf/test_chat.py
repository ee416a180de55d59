"""Conversations: the ids of the tokenizer's own template, the assistant's turns, and their end."""

from __future__ import annotations

import pytest

from fastdistill.hf.chat import end_ids, turn_end
from fastdistill.hf.encoder import Encoder
from helpers.chat_scene import made, target_texts
from helpers.text_scene import (
    CHATML,
    GEMMA,
    HEADERS,
    MISTRAL,
    NEEDS_USER,
    PLAIN,
    TALK,
    TEMPLATES,
    TOKENIZERS,
    byte_level,
    metaspace,
    unigram,
)

ENDS = {
    "chatml": "<|im_end|>",
    "headers": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
STYLES = pytest.mark.parametrize("style", TEMPLATES)


@STYLES
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_those_of_the_tokenizers_own_template(style, kind):
    tokenizer = made(TEMPLATES[style], TOKENIZERS[kind]())
    row = Encoder(tokenizer=tokenizer)({"messages": TALK})
    own = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row.ids.tolist() == own
    assert row.ids.tolist().count(tokenizer.bos_token_id) <= 1
    prompt = Encoder(tokenizer=tokenizer)({"prompt": TALK[:1]})
    own = tokenizer.apply_chat_template(
        TALK[:1], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt.ids.tolist() == own
    assert prompt.prompt == len(own)
    assert row.ids[: row.prompt].tolist() == own


@STYLES
def test_turns_are_targets_with_their_end(style):
    tokenizer = made(TEMPLATES[style])
    first, second = target_texts(tokenizer, Encoder(tokenizer=tokenizer)({"messages": TALK}))
    assert first.strip() == f"the answer is 4.{ENDS[style]}"
    assert second.strip() == f"naïve café\n42{ENDS[style]}"
    example = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert target_texts(tokenizer, Encoder(tokenizer=tokenizer)(example)) == [second]


@STYLES
def test_the_end_of_a_turn_is_measured(style):
    tokenizer = made(TEMPLATES[style])
    end = tokenizer.convert_tokens_to_ids(ENDS[style])
    assert turn_end(tokenizer) == end
    assert end_ids(tokenizer) == sorted({end, tokenizer.eos_token_id})
    assert turn_end(made(TEMPLATES[style], metaspace())) is not None


def test_words_end_no_turn():
    assert turn_end(made(PLAIN)) is None
    assert turn_end(byte_level()) is None
    tokenizer = made(CHATML)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = HEADERS  # not remembered from before
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    refusing = made("{{ raise_exception('nothing') }}")
    assert turn_end(refusing) is None


@pytest.mark.parametrize("template", [CHATML, HEADERS, NEEDS_USER, PLAIN])
def test_the_assistant_may_speak_first(template):
    tokenizer = made(template)
    talk = [{"role": "assistant", "content": "hello there"}, *TALK]
    encoder = Encoder(tokenizer=tokenizer)
    if template == NEEDS_USER:  # its first turn alone is no conversation for the template
        with pytest.raises(ValueError, match=r"messages: expected .* No user query .*example 5"):
            encoder({"messages": talk}, 5)
        return
    parts = target_texts(tokenizer, encoder({"messages": talk}))
    assert len(parts) == 3
    assert parts[0].strip().startswith("hello there")
    completion = encoder({"prompt": [], "completion": talk[:1]})
    assert target_texts(tokenizer, completion)[0].strip().startswith("hello there")


@pytest.mark.parametrize(
    ("template", "talk", "why"),
    [
        (GEMMA, [TALK[1]], "Conversation roles must alternate"),
        (GEMMA, [{"role": "system", "content": "a"}, *TALK], "System role not supported"),
        (MISTRAL, [{"role": "system", "content": "a"}, *TALK], "Only user and assistant"),
        (NEEDS_USER, [{"role": "system", "content": "a"}], "No user query found"),
        ("{{ messages[0].content.nothing() }}", TALK, "UndefinedError"),
        ("{% for %}", TALK, "TemplateSyntaxError"),
        (None, TALK, "chat_template"),
    ],
)
def test_what_a_template_refuses_names_example_and_column(template, talk, why):
    encoder = Encoder(tokenizer=made(template))
    for column in ("messages", "prompt"):
        pattern = rf"{column}: expected a conversation that .* roles .*{why}.*\(example 9\)"
        with pytest.raises(ValueError, match=pattern):
            encoder({column: talk}, 9)


def test_a_conversation_without_an_assistant_is_a_prompt():
    tokenizer = made(CHATML)
    encoder = Encoder(tokenizer=tokenizer)
    for talk in (TALK[:1], [{"role": "system", "content": "a"}]):
        row = encoder({"messages": talk})
        assert row.ids.tolist() == encoder({"prompt": talk}).ids.tolist()
        assert (row.targets == -100).all()


def test_keys_that_are_none_are_no_keys():
    """As Arrow fills them; the template would take them for used."""
    template = (
        CHATML.replace(
            "{{ m['content'] }}",
            "{{ m['content'] }}{% if m.calls is defined %}{% for c in m.calls %}{{ c.name }}"
            "{% if c.arguments.unit is defined %} unit{% endif %}{% endfor %}{% endif %}",
        )
        + "{% if tools %}{% for t in tools %}{{ t.name }}{% endfor %}{% endif %}"
    )
    tokenizer = made(template)
    encoder = Encoder(tokenizer=tokenizer)
    filled = [m | {"calls": None, "name": None} for m in TALK]
    expected = encoder({"messages": TALK}).ids.tolist()
    row = encoder({"messages": filled, "tools": None, "chat_template_kwargs": {"x": None}})
    assert row.ids.tolist() == expected
    assert encoder({"messages": filled, "tools": []}).ids.tolist() == expected
    call = [{"name": "sum", "arguments": {"unit": None}}]
    called = encoder({"messages": [TALK[0], {"role": "assistant", "content": "", "calls": call}]})
    assert target_texts(tokenizer, called) == ["sum<|im_end|>\n"]


def test_contents_in_parts():
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "is"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    tokenizer = made(CHATML)
    row = Encoder(tokenizer=tokenizer)({"messages": parts})
    assert target_texts(tokenizer, row) == ["a cat<|im_end|>\n"]
    assert "what is<|im_end|>" in tokenizer.decode(row.ids.tolist())
    lists = CHATML.replace("{{ m['content'] }}", "{{ m['content'][0]['text'] }}")
    assert target_texts(tokenizer, Encoder(tokenizer=made(lists))({"messages": parts})) == [
        "a cat<|im_end|>\n"
    ]
    image = [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]
    with pytest.raises(ValueError, match=r"messages\[0\].content: expected texts, got .* image"):
        Encoder(tokenizer=tokenizer)({"messages": image})


def test_a_header_that_shares_a_token_with_the_answer():
    """ "assistant: " and the answer's first word are one token; it is the answer's."""
    tokenizer = made(PLAIN)
    talk = [TALK[0], {"role": "assistant", "content": "the answer"}]
    row = Encoder(tokenizer=tokenizer)({"messages": talk})
    assert target_texts(tokenizer, row)[0].strip() == "the answer"


def test_options_of_the_rendering_that_are_ours_are_refused():
    encoder = Encoder(tokenizer=made(CHATML))
    example = {"messages": TALK, "chat_template_kwargs": {"add_generation_prompt": True}}
    with pytest.raises(ValueError, match=r"messages: expected .* argument .add_generation_prompt"):
        encoder(example)


def test_a_tokenizer_that_ends_every_text_ends_no_conversation_twice():
    tokenizer = made(MISTRAL, unigram())
    row = Encoder(tokenizer=tokenizer)({"messages": TALK})
    assert row.ids[-2:].tolist() != [tokenizer.eos_token_id] * 2
