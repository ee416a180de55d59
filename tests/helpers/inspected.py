"""A tiny chat model that Inspect asks, with Inspect's notes in folders of the test, offline."""

import gc
import logging
import socket
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms.vocabulary import world_tokenizer

NEEDED = "Inspect AI is not installed (Python 3.11 or newer: pip install 'fastdistill[inspect]')"

# Inspect's, not ours: it asks tenacity for a wait by a name that newer releases of it deprecate,
# and leaves streams open where an eval ends in an error.
QUIET = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def tiny_subject(seed: int = 0, name: str = "tiny", kind: type[Subject] = Subject) -> Subject:
    torch.manual_seed(seed)
    tokenizer = world_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # else every token is about as likely
    return kind(model, tokenizer, name=name)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No way into the network, no way into the user's folders; logging as it was before."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(home)

    def refused(*args, **kwargs):
        raise AssertionError(f"a test asked the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, sys.excepthook
    yield home
    root.handlers[:], root.level, sys.excepthook = handlers, level, hook
    gc.collect()  # what Inspect left open is found here, not in a later test


def dense_log_probs(subject: Subject, ids: list[int]) -> torch.Tensor:  # [T − 1]
    """log p of each token but the first, by the model's own logits."""
    with torch.no_grad():
        logits = subject.model(torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
