"""What makes the assistant's tokens hard to find in a conversation, one small template each."""

from __future__ import annotations

import pytest

from fastdistill.hf.chat import turn_end
from fastdistill.hf.encoder import Encoder
from fastdistill.hf.tokenizers import with_chat_template
from helpers.chat_scene import made, target_texts
from helpers.text_scene import CHATML, HEADERS, PLAIN, TALK, byte_level, metaspace

ASSISTANT = "{% for m in messages %}{% if m.role == 'assistant' %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHERS = "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
# Llama 3.2: the system turn names the date.
DATED = "Today is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML
# Marks that the tokenizer has no token for, and a last turn with another end (gpt-oss).
RETURNING = (
    ASSISTANT + "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# No end of a turn but the mark of the next one (GLM-4).
OPEN = (
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
    "{% if loop.last %}{{ m.thinking }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# An answer after a tool repeats the header that its generation prompt leaves out (Gemma 4).
CONTINUED = (
    "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}</call>{% endfor %}{% if not m.tool_calls %}<|im_end|>\n"
    "{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n"
    "{% endif %}"
)
# Results of tools share one user turn (Qwen).
MERGED = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool'"
    " %}<|im_start|>user\n{% endif %}<result>{{ m.content }}</result>{% if loop.last or"
    " messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% else %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "</call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)
# A space after the end, which may be a part of the next turn's first token (Llava).
SPACED = (
    ASSISTANT
    + " {{ m.content }}</s> {% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
HEADLESS = CHATML.partition("{% if add_generation_prompt %}")[0]
# Thinking stays in the last turn alone (Qwen3).
FORGETS = (
    ASSISTANT + "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n" + OTHERS + PROMPT
)
# Begins to think where no answer does (DeepSeek-R1).
R1 = (
    ASSISTANT + "<|Assistant|>{{ m.content }}</s>{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
ANSWERS = ["the answer is 4.", "naïve café\n42"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
    TALK[1],
]
CALLS = "<call>add</call><call>add</call>"


def turns(template, talk=TALK, tokenizer=None, **options):
    tokenizer = made(template, tokenizer)
    return target_texts(tokenizer, Encoder(tokenizer=tokenizer, **options)({"messages": talk}))


@pytest.mark.parametrize(
    ("template", "before", "ends"),
    [
        (DATED, "", ["<|im_end|>\n"] * 2),
        (HEADERS, "", ["<|eot_id|>"] * 2),  # trims; begins with a token for the beginning
        (RETURNING, "<|channel|>final<|message|>", ["<|end|>", "<|return|>"]),
        (OPEN, "\n", ["<|user|>"] * 2),
        (SPACED, " ", ["</s>"] * 2),
        (HEADLESS, "<|im_start|>assistant\n", ["<|im_end|>\n"] * 2),  # a prompt never has it
        (R1, "", ["</s>"] * 2),
    ],
)
def test_turns_are_answers_and_their_ends(template, before, ends):
    """`before`: what stands between the generation prompt and the answer."""
    expected = [before + answer + end for answer, end in zip(ANSWERS, ends, strict=True)]
    assert turns(template) == expected
    answers = ["<b>bold</b>", "<think"]  # begin as some marks do
    talk = [dict(m) for m in TALK]
    talk[1]["content"], talk[3]["content"] = answers
    expected = [before + answer + end for answer, end in zip(answers, ends, strict=True)]
    assert turns(template, talk) == expected
    talk[1]["content"], talk[3]["content"] = TALK[0]["content"], TALK[2]["content"]
    assert [t.count("?") for t in turns(template, talk)] == [1, 1]


@pytest.mark.parametrize(
    ("template", "calls", "answer"),
    [
        (OPEN, f"\n{CALLS}<|observation|>", "\nthe answer is 4.<|user|>"),
        (CONTINUED, CALLS, "the answer is 4.<|im_end|>\n"),
        (MERGED, f"{CALLS}<|im_end|>\n", "the answer is 4.<|im_end|>\n"),
    ],
)
def test_calls_of_tools_are_turns_and_their_results_are_not(template, calls, answer):
    assert turns(template, TOOLS) == [calls, answer]
    assert turns(template, TOOLS[:2]) == [calls]


def test_the_next_turns_mark_is_where_a_turn_without_end_stops():
    tokenizer = made(OPEN)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|observation|>"]})
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|user|>")
    thinking = [TALK[0], {**TALK[1], "thinking": "2 and 2: "}]
    assert turns(OPEN, thinking) == ["\n2 and 2: the answer is 4.<|user|>"]
    lines = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    assert turns(lines, TALK[:3]) == ["<assistant>\nthe answer is 4.\n"]  # a line is an end
    assert turn_end(made(lines)) is None
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    system = [{"role": "system", "content": "be kind"}, *TALK]
    assert turns(strict, system) == [f"{answer}<|im_end|>\n" for answer in ANSWERS]
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"  # its next turn has no mark
    talk = [*TALK[:2], {"role": "user", "content": "<b>and?</b>"}]
    assert turns(bare, talk) == ["the answer is 4."]


def test_reasoning_that_an_earlier_turn_loses_is_named():
    talk = [TALK[0], {**TALK[1], "reasoning_content": "2 and 2"}, *TALK[2:]]
    talk[3] = {**talk[3], "reasoning_content": "a word"}
    with pytest.raises(ValueError, match=r"messages\[1\].reasoning_content: expected .* whole"):
        turns(FORGETS, talk)
    tokenizer = made(FORGETS)
    row = Encoder(tokenizer=tokenizer)({"prompt": talk[:3], "completion": talk[3:]})
    expected = "<think>\na word\n</think>\n\nnaïve café\n42<|im_end|>\n"
    assert target_texts(tokenizer, row) == [expected]


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("style", [byte_level, metaspace])
def test_template_tokens_are_left_out_on_demand(style):
    answer = TALK[1]["content"]
    marked = FORGETS.replace("{{ m.content }}<|im_end|>\n" + OTHERS, "").replace(
        "assistant\n{% if", "assistant\n{% generation %}{% if"
    )
    marked += "{{ m.content }}<|im_end|>\n{% endgeneration %}" + OTHERS + PROMPT
    marked = marked.replace(PROMPT, "", 1) if marked.count(PROMPT) > 1 else marked
    for template in (FORGETS, marked):
        whole = turns(template, TALK[:2], style())
        assert whole[0].strip() == f"{EMPTY}{answer}<|im_end|>"
        cut = turns(template, TALK[:2], style(), template_tokens=False)
        assert cut[0].strip() == f"{answer}<|im_end|>"
        thinks = [TALK[0], {**TALK[1], "reasoning_content": "2 and 2"}]
        thought = turns(template, thinks, style(), template_tokens=False)
        assert thought[0].strip() == f"<think>\n2 and 2\n</think>\n\n{answer}<|im_end|>"
    first, second = turns(FORGETS, TALK, style(), template_tokens=False)
    assert (first.strip(), second.strip()) == tuple(f"{a}<|im_end|>" for a in ANSWERS)


@pytest.mark.parametrize(
    "call",
    [
        "{{ c.function.arguments | tojson }}",  # a dict: JSON text would be quoted
        '{% for k, v in c.function.arguments.items() %}{"{{ k }}": {{ v }}}{% endfor %}',
        "{{ '' + c.function.arguments }}",  # JSON text
    ],
)
@pytest.mark.parametrize("empty", ["m.content is not defined", "m['content'] == ''"])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_calls_are_passed_in_the_form_that_the_template_reads(call, empty, arguments):
    calls = "{% for c in m.tool_calls %}{{ c.function.name }}" + call + "{% endfor %}"
    body = f"{{% if {empty} %}}{calls}{{% else %}}{{{{ '' + m['content'] }}}}{{% endif %}}"
    template = CHATML.replace("{{ m['content'] }}", body)
    function = {"name": "add", "arguments": arguments}
    for content in ({"content": ""}, {"content": None}, {}):
        turn = {"role": "assistant", **content, "tool_calls": [{"function": function}]}
        assert turns(template, [TALK[0], turn]) == ['add{"a": 1}<|im_end|>\n']


def test_tools_that_only_a_call_names_are_not_rendered():
    encoder = Encoder(tokenizer=made(MERGED))
    with pytest.raises(ValueError, match="tools: expected a chat template that renders them"):
        encoder({"messages": TOOLS, "tools": [CALL]})
    needs = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{{ tools | tojson }}"
    assert turns(MERGED, TOOLS) == target_texts(
        made(MERGED), Encoder(tokenizer=made(needs + MERGED))({"messages": TOOLS, "tools": [CALL]})
    )


def test_arguments_that_are_no_json_stay():
    function = {"name": "add", "arguments": "1 + 1"}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": function}, function]}
    template = CHATML.replace("<|im_end|>", "{{ m.tool_calls | string }}<|im_end|>")
    assert "'arguments': '1 + 1'" in turns(template, [TALK[0], turn])[0]


def test_a_chat_template_as_text_or_path(tmp_path):
    tokenizer = made(PLAIN)
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML, encoding="utf-8")
    expected = Encoder(tokenizer=made(CHATML))({"messages": TALK})
    for template in (CHATML, path, str(path)):
        row = Encoder(tokenizer=tokenizer, chat_template=template)({"messages": TALK})
        assert row.ids.tolist() == expected.ids.tolist()
        assert row.targets.tolist() == expected.targets.tolist()
    assert tokenizer.chat_template == PLAIN  # the caller's stays
    assert with_chat_template(tokenizer, None) is tokenizer
    with pytest.raises(ValueError, match=r"chat_template: expected .*, got '.*none': No such file"):
        Encoder(tokenizer=tokenizer, chat_template=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="chat_template: expected None without a tokenizer"):
        Encoder(chat_template=path)
    (tmp_path / "image").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        Encoder(tokenizer=tokenizer, chat_template=tmp_path / "image")
