"""Our targets under the stock chat templates that TRL ships, next to the masks of its training
variants, which mark the assistant's tokens with {% generation %}.

On one turn the masks of 18 of 31 variants are equal to ours. The other 13 also mark the part of the
generation prompt in PROMPT_PARTS, which no student has to write. Some have an empty block of
thinking in earlier turns where the stock template has none. All else must be equal.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdistill.hf.chat import ChatRenderer
from fastdistill.hf.encoder import Encoder
from helpers.chat_scene import target_texts

pytestmark = pytest.mark.peers

TRL = importlib.util.find_spec("trl")
FOLDER = Path(str(TRL.origin if TRL else "")).parent / "chat_templates"
STOCK = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
# Of those without variant: what ends a turn, and what begins one with thinking or tools.
ENDS = ("<turn|>\n", "<|tool_response>", "<|eot_id|>")
BEGINNINGS = ("<|channel>thought\n", "<|tool_call>", '{"name": "add_one"')
# Gemma's mark with which a call of a tool ends, and that begins the tool's answer.
OURS_ALONE = {"diffusion_gemma": "<|tool_response>"}
# The part of the generation prompt that a variant marks in a single turn.
PROMPT_PARTS = {
    "deepseek_r1_distill": "<｜Assistant｜>",
    "deepseekv3": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "nemotron_3_5_lightning": "<think>",
    "nemotron_3_nano": "<think>",
    "nemotron_3_super": "<think>",
    "nemotron_3_ultra": "<think>",
    "qwen2_5": "\n",
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
}
# What ends the results of tools is not the assistant's.
VARIANT_ALONE = {"deepseekv3": "<｜tool▁outputs▁end｜>"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(value):
    function = {"name": "add_one", "arguments": {"a": value}}
    return {"type": "function", "id": "c1", "function": function}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add_one",
            "description": "Adds one.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "a number"}},
                "required": ["a"],
            },
        },
    }
]
RESULT = {"role": "tool", "content": "34", "tool_call_id": "c1", "name": "add_one"}
NO_THINKING = "<think>\n\n</think>\n\n"  # its end may be equal to what is before it
HM = {"reasoning_content": "Let me see."}
ONE = [user("Hi there?"), assistant("Blue sky.")]
TEXTS = {
    "one": ONE,
    "system": [{"role": "system", "content": "Be kind."}, *ONE],
    "two": [*ONE, user("And now?"), assistant("Green grass.")],
    "three": [user("q1"), assistant("Blue"), user("q2"), assistant("Blue"), user("Blue"), *ONE[1:]],
    "user last": [*ONE, user("And now?")],
    "spaces": [user(" Hi "), assistant("  Blue sky.\n"), user("So?"), assistant("\n Green\n\n")],
    "marks": [user("q"), assistant("<b>x</b>"), user("<q>"), assistant("<think")],
}
OTHERS = {
    "thinking": [ONE[0], assistant("Blue sky.", **HM)],
    "thinking in the text": [ONE[0], assistant("<think>\nLet me see.\n</think>\n\nBlue sky.")],
    "thinking twice": [ONE[0], assistant("Blue.", **HM), user("So?"), assistant("Green.", **HM)],
    "thinking last": [*ONE, user("So?"), assistant("Green.", **HM)],
    "call": [user("Add?"), assistant("", tool_calls=[call(17)])],
    "text and call": [user("Add?"), assistant("I add.", tool_calls=[call(17)])],
    "calls": [user("Add?"), assistant("", tool_calls=[call(17), call(18)])],
    "result": [user("Add?"), assistant("", tool_calls=[call(33)]), RESULT, assistant("It is 34.")],
}
OTHERS["result and more"] = [*OTHERS["result"], user("More?"), assistant("No more.")]
USING_TOOLS = ("call", "text and call", "calls", "result", "result and more")
OTHERS["unlisted tool"] = OTHERS["result"]
REFUSALS = re.compile(
    r"messages\[\d\]\.(reasoning_content|content|tool_calls): expected a chat template that renders"
    r"|tools: expected a chat template that renders them, got one that leaves out 'add_one'"
    r"|messages: expected a conversation that the tokenizer's chat template takes, .* (System role"
    r"|Conversation roles|This model only|'tool_calls'|str object has no element|.*is not support)"
)


@functools.cache
def by_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer of one token for each byte, so that masks are those of characters."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def template(name):
    path = FOLDER / f"{name}.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else None


def own_mask(variant, talk, more):
    """transformers' ids and assistant mask; contents are texts or parts, as the template reads."""
    tokenizer = by_bytes()
    tokenizer.chat_template = variant
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    for form in (talk, parts):
        try:
            out = tokenizer.apply_chat_template(
                form, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
            )
        except Exception:
            continue
        text = tokenizer.decode(out["input_ids"])
        if all(m["content"].split("</think>")[-1].strip() in text for m in talk):
            return out["input_ids"], out["assistant_masks"]
    return None


def differences(ids, targets, other_ids, other_mask):
    """The parts that only the first mask has, and that only the other one has.

    The other text may have more than this text: parts that it alone has come last.
    """
    wanted, unread = [-1] * len(ids), list(other_mask)
    same = SequenceMatcher(None, ids, other_ids, autojunk=False)
    for i, j, size in same.get_matching_blocks():
        wanted[i : i + size] = other_mask[j : j + size]
        unread[j : j + size] = [0] * size
    assert -1 not in wanted
    pairs = list(zip(targets, wanted, strict=True))
    ours = runs(ids, [target > want for target, want in pairs])
    theirs = runs(ids, [target < want for target, want in pairs])
    return ours, theirs, runs(other_ids, unread)


def runs(ids, mask):
    """The text of each run of tokens in a mask."""
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    return [by_bytes().decode([i for i, _ in group]) for inside, group in groups if inside]


def generation_prompt(talk, more):
    """What asks for the next turn of a conversation under the tokenizer's template."""
    chat = ChatRenderer(by_bytes(), "messages", more)
    prompt, plain = (chat.render(talk, has_prompt)[0] for has_prompt in (True, False))
    return prompt.removeprefix(plain.removesuffix("<eos>"))


def check(name, talk, more):
    """Compare the targets with the variant's; return what was refused, if anything was."""
    stock = template(name)
    tokenizer = by_bytes()
    tokenizer.chat_template = stock
    try:
        row = Encoder(tokenizer=tokenizer)({"messages": talk, **more})
    except ValueError as error:
        return str(error)
    targets = [int(target != -100) for target in row.targets.tolist()]
    variant = template(f"{name}_training") or (stock if "endgeneration" in stock else None)
    if variant is None:
        answers = [message for message in talk if message["role"] == "assistant"]
        for part, message in zip(target_texts(tokenizer, row), answers, strict=True):
            content = message["content"].strip()
            assert part.endswith(ENDS)
            assert content in part
            assert len(message) > 2 or part in [content + end for end in ENDS]
            assert part.startswith((content, *BEGINNINGS) if len(message) > 2 else content)
        return None
    theirs = own_mask(variant, talk, more)
    if theirs is None:  # the variant drops what the stock template renders
        return None
    ours, variants, unread = differences(row.ids.tolist(), targets, *theirs)
    prompts = [
        generation_prompt(talk[:turn], more)
        for turn, message in enumerate(talk)
        if message["role"] == "assistant"
    ]
    if talk is ONE:
        assert (ours, unread) == ([], [])
        assert variants == ([PROMPT_PARTS[name]] if name in PROMPT_PARTS else [])
    assert {*ours} <= {OURS_ALONE.get(name)}
    assert all(
        part == VARIANT_ALONE.get(name) or any(part in prompt for prompt in prompts)
        for part in variants
    )
    assert all(part in 2 * NO_THINKING for part in unread), unread
    return None


def test_there_are_the_templates_that_this_was_written_for():
    pytest.importorskip("trl")
    assert len(STOCK) >= 41
    variants = {name for name in STOCK if template(f"{name}_training") is not None}
    assert len(variants) >= 31
    assert variants.issuperset(PROMPT_PARTS)


@pytest.mark.parametrize("name", STOCK)
def test_answers_are_read_under_every_template(name):
    for kind, talk in TEXTS.items():
        refusal = check(name, talk, {})
        assert refusal is None or (kind == "system" and "System role" in refusal)


@pytest.mark.parametrize("name", STOCK)
def test_thinking_and_tools_are_read_or_refused_by_name(name):
    for kind, talk in OTHERS.items():
        refusal = check(name, talk, {"tools": TOOLS} if kind in USING_TOOLS else {})
        assert refusal is None or REFUSALS.search(refusal), kind


def test_families_with_thinking_and_tools_refuse_neither():
    for name in set(STOCK) & {"qwen3_8", "nemotron_3_nano", "muse_glimmer", "glm4moe", "qwen3"}:
        assert check(name, OTHERS["thinking"], {}) is None
        for kind in ("call", "result", "result and more"):
            assert check(name, OTHERS[kind], {"tools": TOOLS}) is None
