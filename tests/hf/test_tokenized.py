"""Texts become the ids that the tokenizer gives the whole, with ends and beginnings once."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from fastdistill.hf.chat import end_ids
from fastdistill.hf.encoder import Encoder
from helpers.text_scene import CHATML, TALK, TOKENIZERS, Slow, byte_level, metaspace, unigram, words

PAIRS = [
    ("what is 2+2=", "4"),
    ("the answer is ", "42"),
    ("the answer is", " 42"),
    ("naïve caf", "é"),
    ("how are you ", "😀?"),
    ("😀", "日本"),
    ("what is this?\n", "\na cat."),
    ("the ans", "wer"),
    ("", "42"),
    ("the", "  \n"),
]
ALL = pytest.mark.parametrize("kind", TOKENIZERS)


def whole(tokenizer, text):
    """What the tokenizer itself gives the text, without an end."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


@ALL
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_are_the_whole_text(kind, prompt, completion):
    tokenizer = TOKENIZERS[kind]()
    row = Encoder(tokenizer=tokenizer)({"prompt": prompt, "completion": completion})
    assert row.ids.tolist() == [*whole(tokenizer, prompt + completion), tokenizer.eos_token_id]
    targets = row.targets != -100
    begin = targets.tolist().index(True)
    assert targets[begin:].all()
    assert row.prompt == begin
    text = tokenizer.decode(row.ids[:begin].tolist(), skip_special_tokens=True)
    assert prompt.strip().startswith(text.strip())
    own = whole(tokenizer, prompt)
    unknown = tokenizer.unk_token_id  # one of these may stand for characters of both
    if row.ids[: len(own)].tolist() == own and unknown not in own:
        assert begin == len(own)


@ALL
def test_a_completion_gains_no_space_and_loses_no_merge(kind):
    tokenizer = TOKENIZERS[kind]()
    row = Encoder(tokenizer=tokenizer)({"prompt": "what is 2+2=", "completion": "4"})
    text = tokenizer.decode(row.ids.tolist(), skip_special_tokens=True)
    assert text.strip() == "what is 2+2=4"
    joined = Encoder(tokenizer=tokenizer)({"prompt": "the answer is ", "completion": "42"})
    assert joined.ids.tolist()[:-1] == whole(tokenizer, "the answer is 42")


@ALL
def test_a_text_ends_and_begins_once(kind):
    tokenizer = TOKENIZERS[kind]()
    end = tokenizer.eos_token_id
    encoder = Encoder(tokenizer=tokenizer)
    for text in ("the answer", "the answer</s>"):
        row = encoder({"text": text})
        assert row.ids.tolist().count(end) == 1
        assert row.ids[-1] == end
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        row = encoder({"text": "<s>the answer"})
        assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
    prompt = encoder({"prompt": "the answer"})
    assert end not in prompt.ids
    assert (prompt.targets == -100).all()
    assert prompt.prompt == len(prompt.ids)


@ALL
def test_a_text_that_a_template_rendered_gets_no_second_end(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = tokenizer.apply_chat_template(TALK[:2], tokenize=False)
    prompt = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    pair = {"prompt": prompt, "completion": text[len(prompt) :]}
    for eos in ("<|im_end|>", "</s>"):
        tokenizer.eos_token = eos
        for example in ({"text": text}, pair):
            ids = encoder(example).ids.tolist()
            assert ids.count(end) == 2  # the user's and the assistant's
            assert tokenizer.convert_tokens_to_ids("</s>") not in ids


def test_an_empty_completion_is_an_end():
    tokenizer = unigram()
    row = Encoder(tokenizer=tokenizer)({"prompt": "the answer", "completion": ""})
    assert row.targets[-1] == row.ids[-1] == tokenizer.eos_token_id
    assert (row.targets[:-1] == -100).all()


def test_a_text_that_has_the_end_in_its_middle_keeps_it():
    tokenizer = unigram()
    row = Encoder(tokenizer=tokenizer)({"text": "the</s> answer"})
    assert row.ids.tolist().count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_with_cls_and_sep():
    tokenizer = words()
    encoder = Encoder(tokenizer=tokenizer)
    row = encoder({"prompt": "the answer is ", "completion": "42 and"})
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    assert tokens == ["[CLS]", "the", "answer", "is", "42", "and", "[SEP]"]
    assert row.ids.tolist() == tokenizer("the answer is 42 and")["input_ids"]
    assert (row.targets != -100).tolist() == [False] * 4 + [True] * 3
    assert encoder({"text": "the answer"}).ids.tolist() == tokenizer("the answer")["input_ids"]
    assert encoder({"text": "the answer [SEP]"}).ids.tolist()[-1] == 3
    assert encoder({"text": "the answer [SEP]"}).ids.tolist().count(3) == 1
    assert end_ids(tokenizer) == [3]


def test_words_without_a_token_for_what_is_joined_stay_apart():
    tokenizer = words()
    row = Encoder(tokenizer=tokenizer)({"prompt": "the answer", "completion": "is 42"})
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    assert tokens == ["[CLS]", "the", "answer", "is", "42", "[SEP]"]


def test_the_beginning_of_an_empty_prompt_is_the_prompt():
    tokenizer = metaspace()
    row = Encoder(tokenizer=tokenizer)({"prompt": "", "completion": "42"})
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.prompt == 1
    alone = Encoder(tokenizer=tokenizer)({"prompt": ""})
    assert alone.ids.tolist() == [tokenizer.bos_token_id]


def test_a_tokenizer_without_offsets_is_right_or_refused():
    fast = byte_level()
    slow = Slow(fast)
    for prompt, completion in (("the answer is", " 42"), ("what is this?\n", "a cat.")):
        example = {"prompt": prompt, "completion": completion}
        ours, theirs = Encoder(tokenizer=slow)(example), Encoder(tokenizer=fast)(example)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.targets.tolist() == theirs.targets.tolist()
    with pytest.raises(
        ValueError, match=r"processing_class: expected a fast .*boundary.*example 3"
    ):
        Encoder(tokenizer=slow)({"prompt": "the answer is ", "completion": "42"}, 3)
    around = Slow(unigram())
    row = Encoder(tokenizer=around)({"text": "the answer"})
    assert row.ids.tolist() == unigram()("the answer")["input_ids"]


def test_trailing_spaces_of_a_trimmed_token_belong_to_the_completion():
    """The offsets of a token "?\\n" may leave out the line's end, which is the completion's."""
    tokenizer = byte_level(trim=True)
    tokenizer.add_tokens(["?\n"])
    row = Encoder(tokenizer=tokenizer)({"prompt": "what?", "completion": "\nthe"})
    targets = tokenizer.decode(row.targets[row.targets != -100].tolist())
    assert "\nthe" in targets


def test_what_a_tokenizer_raises_names_example_and_column():
    class Broken:
        is_fast = True

        def __call__(self, text, **options):
            raise RuntimeError("\x1b[2J broken")

    with pytest.raises(ValueError, match=r"text: expected a text that Broken takes, .*example 7"):
        Encoder(tokenizer=Broken())({"text": "a"}, 7)


def test_ends_that_a_post_processor_adds_are_ends():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>",
        special_tokens=[("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))],
    )
    row = Encoder(tokenizer=tokenizer)({"prompt": "the", "completion": " answer"})
    assert row.ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id not in row.ids
    assert row.ids[-1].item() in end_ids(tokenizer)
