"""Every form of example becomes the ids that the model will see, with the right targets."""

from __future__ import annotations

import pytest

from fastdistill.hf.encoder import Encoder
from helpers.example_texts import STOCK, TALK, WORDS, tokenizer

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} <end>{% endgeneration %} {% else %}{{ m['content'] }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
# As Qwen3's: only the last turn has thinking.
FORGETTING = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' and loop.last %}think "
    "{% endif %}{{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def read(example, template=None, **options):
    """(all tokens, those that are targets), as words."""
    row = Encoder(tokenizer=tokenizer(template), **options)(example)
    is_target = row.targets != -100
    assert (row.targets[is_target] == row.ids[is_target]).all()
    assert row.attention_mask.all()
    words = [WORDS[i] for i in row.ids]
    return " ".join(words), " ".join(w for w, s in zip(words, is_target.tolist(), strict=True) if s)


def test_text_is_all_target_and_gets_its_end():
    assert read({"text": "a cat"}) == ("a cat <end>", "a cat <end>")
    assert read({"text": "a cat <end>"}) == ("a cat <end>", "a cat <end>")


def test_completion_is_the_target():
    example = {"prompt": "what is this", "completion": "a cat"}
    assert read(example) == ("what is this a cat <end>", "a cat <end>")
    assert read(example, completion_only=False)[1] == "what is this a cat <end>"
    assert read({"prompt": "what is"}) == ("what is", "")


@pytest.mark.parametrize("template", [STOCK, MARKED])
def test_the_assistants_turns_are_the_targets(template):
    whole, target = read({"messages": TALK}, template)
    assert whole == (
        "<user> what is this <end> <assistant> a cat <end> <user> a dog <end> <assistant> no it is "
        "a cat <end>"
    )
    assert target == "a cat <end> no it is a cat <end>"
    assert read({"messages": TALK}, template, completion_only=False)[1] == whole


@pytest.mark.parametrize("template", [STOCK, MARKED, FORGETTING])
def test_a_conversation_as_prompt_and_completion(template):
    whole, target = read({"prompt": TALK[:3], "completion": TALK[3:]}, template)
    assert target.removeprefix("think ") == "no it is a cat <end>"
    assert whole.endswith(target)
    assert read({"prompt": TALK[:3]}, template) == (
        "<user> what is this <end> <assistant> a cat <end> <user> a dog <end> <assistant>",
        "",
    )


def test_a_template_that_begins_the_last_turn_in_another_way():
    whole, target = read({"messages": TALK}, FORGETTING)
    assert whole.endswith("a cat <end> <user> a dog <end> <assistant> think no it is a cat <end>")
    assert target == "a cat <end> think no it is a cat <end>"


def test_a_template_that_drops_a_part_of_earlier_turns_is_refused():
    template = FORGETTING.replace(
        "{{ m['content'] }}",
        "{{ m['content'] if loop.last else m['content'].split(' think ')[-1] }}",
    )
    talk = [TALK[0], {"role": "assistant", "content": "it is think a cat"}, *TALK[2:]]
    with pytest.raises(
        ValueError, match=r"messages\[1\].content: expected a chat template that renders it whole"
    ):
        read({"messages": talk}, template)
    assert read({"prompt": talk[:3], "completion": talk[3:]}, template)[1].endswith("a cat <end>")


def test_given_masks_become_targets():
    example = {"input_ids": [4, 5, 6, 7], "assistant_masks": [0, 0, 1, 1]}
    assert Encoder()(example).targets.tolist() == [-100, -100, 6, 7]
    example = {"input_ids": [4, 5, 6, 7], "completion_mask": [0, 1, 1, 0]}
    assert Encoder()(example).targets.tolist() == [-100, 5, 6, -100]


def test_long_examples_are_cut():
    row = Encoder(max_length=3)({"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]})
    assert row.ids.tolist() == [4, 5, 6]
    assert row.targets.tolist() == [-100, 5, 6]
    assert read({"text": "a cat and a dog"}, max_length=3)[0] == "a cat and"


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"expected dicts with input_ids, .* got \['x'\]"):
        Encoder()({"x": 1})
    with pytest.raises(ValueError, match=r"expected the tokenizer, to read \['text'\]"):
        Encoder()({"text": "a"})
    with pytest.raises(ValueError, match=r"text: expected at least one token"):
        Encoder(tokenizer=tokenizer(eos_token=None))({"text": ""})
