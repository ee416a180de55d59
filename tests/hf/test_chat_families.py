"""Chat templates of families that ask with something else than they answer with, render the last
turn in another way than earlier ones, or do not render all that a conversation has."""

from __future__ import annotations

import pytest

from fastdistill.hf.encoder import Encoder
from helpers.chat_scene import made, target_texts
from helpers.text_scene import CHATML, TALK, TOKENIZERS, byte_level

USER = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% else %}<|im_start|>assistant\n"
)
NEXT = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
# Qwen3: the last turn alone has thinking, an empty one.
LAST_THINKS = (
    USER + "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    f"{NEXT}{{% endif %}}"
)
# DeepSeek-R1: a prompt begins thinking that no answer has.
PROMPT_THINKS = (
    USER + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + NEXT + "<think>\n{% endif %}"
)
# Nemotron: the prompt's thinking goes on, the answer's is empty.
EMPTY_THINKS = USER + "<think></think>{{ m.content }}<|im_end|>\n" + NEXT + "<think>\n{% endif %}"
# Phi-3: an end of text behind a whole conversation.
CLOSING = (
    USER + f"{{{{ m.content }}}}<|im_end|>\n{NEXT}{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
)
# gpt-oss: the last turn ends with another token.
RETURNING = (
    USER + "{{ m.content }}{{ '<|eot_id|>' if loop.last else '<|im_end|>' }}"
    f"{NEXT}{{% endif %}}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant:\n"
    "  {% generation %} {{ m.content }} {% endgeneration -%} <|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
FAMILIES = {
    "last thinks": (LAST_THINKS, "<|im_end|>\n", "<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "prompt thinks": (PROMPT_THINKS, "<|im_end|>\n", "", "<|im_end|>\n"),
    "empty thinks": (EMPTY_THINKS, "<|im_end|>\n", "", "<|im_end|>\n"),
    "closing": (CLOSING, "<|im_end|>\n", "", "<|im_end|>\n</s>"),
    "returning": (RETURNING, "<|im_end|>", "", "<|eot_id|>"),
}
PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}",
)
IN_PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_turns_of_a_conversation_are_its_contents_and_their_ends(family, kind):
    template, end, header, last = FAMILIES[family]
    tokenizer = made(template, TOKENIZERS[kind]())
    row = Encoder(tokenizer=tokenizer)({"messages": TALK})
    own = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row.ids.tolist() == own
    if kind != "byte level":
        return
    begin = "</think>" if family == "empty thinks" else ""
    first, second = target_texts(tokenizer, row)
    assert first.lstrip(">") == f"{begin}the answer is 4.{end}".lstrip(">")
    assert second.lstrip(">") == f"{header}{begin}naïve café\n42{last}".lstrip(">")
    for talk in (TALK[:2], [*TALK, TALK[0]], [{"role": "assistant", "content": "hi"}, *TALK]):
        parts = target_texts(tokenizer, Encoder(tokenizer=tokenizer)({"messages": talk}))
        assert "".join(parts).count("the answer is 4.<") == 1
        assert not any("what" in part or "user" in part for part in parts)
    example = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert target_texts(tokenizer, Encoder(tokenizer=tokenizer)(example)) == [second]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answers", [("", "yes"), ("yes", ""), ("yes", "yes"), ("<b>", "</b>0a")])
def test_answers_that_are_empty_or_alike(family, answers):
    template, end, header, last = FAMILIES[family]
    tokenizer = made(template)
    talk = [dict(m) for m in TALK]
    talk[1]["content"], talk[3]["content"] = answers
    first, second = target_texts(tokenizer, Encoder(tokenizer=tokenizer)({"messages": talk}))
    assert first.endswith(answers[0] + end)
    assert second.endswith(answers[1] + last)
    assert len(second) <= len(f"></think>{header}{answers[1]}{last}")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_marked_turns_that_begin_or_end_with_a_space(kind):
    tokenizer = made(MARKED, TOKENIZERS[kind]())
    row = Encoder(tokenizer=tokenizer)({"messages": TALK})
    own = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row.ids.tolist() == own
    parts = target_texts(tokenizer, row)
    assert len(parts) == 2
    assert parts[0].strip() == "the answer is 4."
    assert "user" not in "".join(parts)


def test_several_templates_under_one_name():
    tokenizer = made({"default": CHATML, "tool_use": MARKED})
    row = Encoder(tokenizer=tokenizer)({"messages": TALK})
    assert target_texts(tokenizer, row)[0] == "the answer is 4.<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] + '' }}"),
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is string }}"),
        PARTS,
        MARKED,
        MARKED.replace("m.content", "m.content[0].text"),
    ],
)
@pytest.mark.parametrize("talk", [TALK, IN_PARTS])
def test_contents_are_read_as_the_template_takes_them(template, talk):
    tokenizer = made(template)
    row = Encoder(tokenizer=tokenizer)({"messages": talk})
    first, second = target_texts(tokenizer, row)
    assert first.strip().removesuffix("<|im_end|>") == "the answer is 4."
    assert second.strip().removesuffix("<|im_end|>") == "naïve café\n42"
    text = tokenizer.decode(row.ids.tolist())
    assert "what is 2+2?" in text
    assert "'text'" not in text
    prompt = Encoder(tokenizer=tokenizer)({"prompt": talk[:1]})
    assert "what is 2+2?" in tokenizer.decode(prompt.ids.tolist())


@pytest.mark.parametrize(
    ("template", "messages", "more", "name"),
    [
        (
            PROMPT_THINKS,
            [TALK[0], {"role": "assistant", "content": "<think>a</think>b"}],
            {},
            r"messages\[1\].content",
        ),
        (
            CHATML,
            [TALK[0], {**TALK[1], "reasoning_content": "hm"}],
            {},
            r"messages\[1\].reasoning_content",
        ),
        (CHATML, [TALK[0], {**TALK[1], "tool_calls": CALL}], {}, r"messages\[1\].tool_calls"),
        (
            CHATML.replace(
                "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
            ),
            [{"role": "system", "content": "be kind"}, *TALK],
            {},
            r"messages\[0\].content",
        ),
        (CHATML, TALK, {"tools": CALL}, "tools"),
        (MARKED.replace("m.content", "m.content[:3]"), TALK, {}, r"messages\[0\].content"),
    ],
)
def test_what_the_template_does_not_render_is_refused_by_name(template, messages, more, name):
    encoder = Encoder(tokenizer=made(template))
    with pytest.raises(ValueError, match=rf"{name}: expected a chat template that .*example 4"):
        encoder({"messages": messages, **more}, 4)


def test_thinking_that_the_template_renders_is_learned():
    tokenizer = made(CHATML.replace("{{ m['content'] }}", "{{ m.thinking }}{{ m['content'] }}"))
    talk = [TALK[0], {**TALK[1], "thinking": "so "}]
    row = Encoder(tokenizer=tokenizer)({"messages": talk})
    assert target_texts(tokenizer, row) == ["so the answer is 4.<|im_end|>\n"]
    earlier = [TALK[0], {**TALK[1], "reasoning_content": "hm"}, *TALK[2:]]  # of a prompt
    row = Encoder(tokenizer=made(CHATML, byte_level()))(
        {"prompt": earlier[:3], "completion": earlier[3:]}
    )
    assert row.prompt is not None
