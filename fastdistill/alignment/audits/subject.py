"""A model under audit: batched generation, log-probabilities and hidden states.

log p(completion | prompt) = Σ_t z_t[id_t] − lse_t        by linear_lse_gather, no [N, V] logits
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, PreTrainedModel

from ...hf.chat import turn_end
from ...hf.checkpoint import StoredModel
from ...hf.generation import can_batch, ends_of, generate_rows, ordinary_ends, special_ids
from ...hf.lm_head import LMHead, evaluating, head_of, verify_head
from ...hf.positions import check_room
from ...hf.row_reader import BatchedForward, read_rows
from ...hf.tokenized import tokenize
from ...losses.linear_head import linear_lse_gather
from ...quant.formats.checkpoint_gate import load_tokenizer
from ...runtime.checks import fail
from ...runtime.printable import printable
from .prompts import Prompt, render_prompt
from .seeded_sampling import SeededSampling

GENERATION_BATCH = 256  # rows
ENCODED = 2**16  # encoded rows in memory; studies read the same prompts many times

logger = logging.getLogger(__name__)


class TokenRow(NamedTuple):
    """Token ids of a prompt and of the completion that begins at `begin`."""

    ids: list[int]
    begin: int

    @property
    def targets(self) -> list[int]:
        """The completion; the first token of a row has no prediction and is never one of them."""
        return self.ids[max(self.begin, 1) :]


class CompletionLogProbs(NamedTuple):
    """Log-probabilities of completions, conditional on their prompts."""

    total: Tensor  # (n,) fp32: Σ over the tokens of the completion
    tokens: Tensor  # (n,) int64: number of tokens


class Subject:
    """A causal language model and its tokenizer. The model is not modified.

    Args:
        model: a loaded model, or a path or StoredModel (safetensors; no code of the checkpoint
            runs).
        tokenizer: None loads the tokenizer stored at the path.
        name: name in reports. None: the last part of the path, or the class name.
        device: device for a model loaded from a path; a loaded model stays where it is.
        tokens_per_batch: tokens of one forward pass, padding included. None derives it from the
            available memory.
        impl: backend of losses and scores.
        ends: ids of the tokens that end an answer. None: those of the tokenizer and of the model's
            generation settings. For a path, these must be special tokens or marks such as <end>: a
            checkpoint that declares common words as ends would cut off its answers.

    Other generation settings of the model are ignored. An answer also ends at the model's last
    position, if that comes before max_new_tokens.

    ended_at_words: token id -> number of answers that ended at this token, which is not special.
    ended_at_positions: model name -> number of answers that ended at the last position.
    """

    def __init__(
        self,
        model: PreTrainedModel | StoredModel | str | Path,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
        tokens_per_batch: int | None = None,
        impl: str = "auto",
        ends: Sequence[int] | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            model = StoredModel.from_path(model, role="model")
        if isinstance(model, StoredModel):
            target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            name = name or model.path.name
            if tokenizer is None:
                tokenizer = load_tokenizer(model.tokenizer_folder)
            model = model.load(target).eval()
            ends = special_ends(model, tokenizer) if ends is None else ends
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model: expected a causal language model, the path of one, or a Subject, got "
                f"{type(model).__name__}"
            )
        if tokenizer is None:
            expected = f"the tokenizer of {type(model).__name__}"
            fail("tokenizer", expected, "none", "pass Subject(model, tokenizer)")
        self.model: Any = model
        self.tokenizer, self.impl = tokenizer, impl
        self.name = name or type(model).__name__
        self._ends = None if ends is None else sorted(ends)
        self._encoded: dict[tuple[Prompt, str], TokenRow] = {}
        self.ended_at_words: Counter[int] = Counter()
        self.ended_at_positions: Counter[str] = Counter()  # by the model's name
        verify_head(model)
        self.reader = BatchedForward(model, tokens_per_batch)
        if isinstance(model, PreTrainedModel) and model.can_generate():
            can_batch(model)  # measured once now, not during an audit

    @property
    def head(self) -> LMHead:
        return head_of(self.model)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def with_model(self, model: Any, name: str) -> Subject:
        """Returns a Subject of another model with these settings and shared counts of ends."""
        batch = self.reader.tokens_per_batch
        subject = Subject(
            model,
            self.tokenizer,
            name=name,
            tokens_per_batch=batch,
            impl=self.impl,
            ends=self._ends,
        )
        subject._encoded = self._encoded
        subject.ended_at_words = self.ended_at_words
        subject.ended_at_positions = self.ended_at_positions
        return subject

    def ids(self, prompt: Prompt, completion: str = "") -> TokenRow:
        """Returns the token ids of prompt and completion, with one prompt token or more.

        An empty prompt is replaced by the beginning-of-text token.
        """
        text = prompt, completion
        if (row := self._encoded.get(text)) is None:
            if len(self._encoded) >= ENCODED:
                self._encoded.clear()
            row = self._encoded[text] = self._encode(prompt, completion)
        return TokenRow([*row.ids], row.begin)

    def _encode(self, prompt: Prompt, completion: str) -> TokenRow:
        text = render_prompt(prompt, self.tokenizer)
        special = prompt.text is not None or not getattr(self.tokenizer, "chat_template", None)
        before = self._tokens(text, special)
        # Encoded together: a token may span the border of prompt and completion.
        both = self._tokens(text + completion, special)
        shared = common_length(before, both)
        if completion and shared == len(both):
            fail("completion", "text with at least one token", repr(completion))
        return TokenRow(both, shared) if shared else TokenRow([self._beginning(), *both], 1)

    def encode_completion(self, prompt: Prompt, completion: str) -> TokenRow:
        """Returns the same as `ids`, and raises ValueError for an empty completion."""
        if not completion:
            fail("completion", "text with at least one token", "''")
        return self.ids(prompt, completion)

    def encode_answer(self, prompt: Prompt, answer: str) -> TokenRow:
        """Returns the same as `encode_completion`, with the token that ends the answer."""
        ids, begin = self.encode_completion(prompt, answer)
        return TokenRow([*ids, self.end_of(prompt)], begin)

    def _tokens(self, text: str, special: bool) -> list[int]:
        tokens = tokenize(self.tokenizer, text, "prompt", (), special=special)
        return [*tokens.before, *tokens.ids]  # without tokens that some tokenizers append

    def end_of(self, prompt: Prompt) -> int:
        """Returns the token that ends an answer: end of turn (chat template) or end of text.

        Raises:
            ValueError: the tokenizer has no end of text.
        """
        text_end = self.tokenizer.eos_token_id
        if text_end is None:
            fail("tokenizer", "an end of text, which ends an answer", "none", "set eos_token")
        end = None if prompt.text is not None else turn_end(self.tokenizer)
        return int(text_end if end is None or end not in self.ends else end)

    def _beginning(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        hint = "the tokenizer has no beginning and no end of text to use instead"
        fail("prompt", "at least one token", "none", hint)

    def token_of(self, word: str) -> int:
        """Returns the id of a word, or of its first token."""
        ids: list[int] = self.tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            fail("word", "a word with at least one token", repr(word))
        return ids[0]

    @torch.no_grad()
    def hidden(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:  # (T_i, H) each
        """Returns the hidden states at the input of the LM head, for rows of token ids."""
        ids, mask = pad_rows(rows), pad_rows([[1] * len(row) for row in rows])
        with evaluating(self.model):
            states = self.reader.hidden(read_rows(ids.to(self.device), mask, self.reader.vocab))
        return [states[i, : len(row)] for i, row in enumerate(rows)]

    def predicting_states(self, rows: Sequence[TokenRow]) -> list[Tensor]:  # (T_i, H) each
        """Returns the hidden states that predict the targets of each row."""
        states = zip(rows, self.hidden([row.ids for row in rows]), strict=True)
        return [h[max(row.begin, 1) - 1 : len(row.ids) - 1] for row, h in states]

    @torch.no_grad()
    def last_hidden(self, prompts: Sequence[Prompt]) -> Tensor:  # (n, H)
        """Returns the hidden states that predict the first token after each prompt."""
        return torch.stack([h[-1] for h in self.hidden([self.ids(p)[0] for p in prompts])])

    @torch.no_grad()
    def log_probs(self, hidden: Tensor, ids: Tensor) -> Tensor:  # (N, H), (N, K) -> (N, K) fp32
        """Returns log softmax(z)[ids] at hidden states at the input of the LM head."""
        head = self.head
        gathered = linear_lse_gather(
            hidden, head.weight, ids.to(hidden.device), impl=self.impl, **head.options()
        )
        return gathered.logits - gathered.lse[..., None]

    @torch.no_grad()
    def completion_logprobs(
        self, prompts: Sequence[Prompt], completions: Sequence[str]
    ) -> CompletionLogProbs:
        """Returns log p(completion | prompt) with teacher forcing."""
        pairs = zip(prompts, completions, strict=True)
        return self.row_logprobs([self.encode_completion(p, c) for p, c in pairs])

    @torch.no_grad()
    def row_logprobs(self, rows: Sequence[TokenRow]) -> CompletionLogProbs:
        """Returns Σ log p of the targets of each row; 0 where there are none."""
        parts = self.token_logprobs(rows, self.predicting_states(rows))
        total = torch.stack([part.sum() for part in parts])
        return CompletionLogProbs(total, torch.tensor([len(part) for part in parts]))

    def token_logprobs(self, rows: Sequence[TokenRow], states: Sequence[Tensor]) -> list[Tensor]:
        """Returns log p (T,) of each row's targets, at the states (T, H) that predict them."""
        ids = torch.tensor([i for row in rows for i in row.targets], dtype=torch.long)[:, None]
        logprobs = self.log_probs(torch.cat(list(states)), ids)[:, 0].cpu()
        return list(torch.split(logprobs, [len(h) for h in states]))

    @torch.no_grad()
    def option_log_probs(
        self, prompts: Sequence[Prompt], options: Sequence[str]
    ) -> Tensor:  # (n, options)
        """Returns log p(option | prompt) of all tokens of each option.

        A prompt is read once for all options of one token. A text that another one continues is
        not read by itself.
        """
        rows = [self.encode_completion(p, option) for p in prompts for option in options]
        inputs = [tuple(row.ids[:-1]) for row in rows]
        # Sorted, a text comes directly before one that continues it.
        ordered = sorted(set(inputs))
        longer = [*ordered[1:], ()]
        read = [a for a, b in zip(ordered, longer, strict=True) if b[: len(a)] != a]
        states = self.hidden(read)
        spans = [
            states[bisect_left(read, text)][max(row.begin, 1) - 1 : len(text)]
            for row, text in zip(rows, inputs, strict=True)
        ]
        totals = [part.sum() for part in self.token_logprobs(rows, spans)]
        return torch.stack(totals).view(len(prompts), len(options))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[str]:
        """Returns generated text without special tokens; settings as in `generate_ids`."""
        new = self.generate_ids([self.ids(p)[0] for p in prompts], **settings)
        return list(map(self.text, new))

    @torch.no_grad()
    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        streams: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Returns the new tokens of rows of token ids, the first end token included.

        Greedy at temperature 0. The sample of a row depends only on `seed` and its stream (default:
        its index in `rows`), not on the other rows.

        Raises:
            ValueError: a row that leaves no position for a new token.
        """
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        row_streams = range(len(rows)) if streams is None else streams
        check_room(self.reader.row_limit, rows)  # for all rows, before generation starts
        new: list[list[int]] = []
        for start in range(0, len(rows), GENERATION_BATCH):

            def samplers(batch: list[int], width: int, start: int = start) -> list[LogitsProcessor]:
                if temperature <= 0:
                    return []
                drawn = [row_streams[start + i] for i in batch]
                settings: Any = {"temperature": temperature, "seed": seed, "streams": drawn}
                return [SeededSampling(width, max_new_tokens, **settings)]

            new += generate_rows(
                self.model,
                rows[start : start + GENERATION_BATCH],
                max_new_tokens=max_new_tokens,
                pad_id=pad or 0,
                ends=self.ends,
                device=self.device,
                processors=samplers,
                limit=self.reader.row_limit,
            )
        word_ends = ordinary_ends(self.ends, self.tokenizer)
        self.ended_at_words.update(row[-1] for row in new if row and row[-1] in word_ends)
        truncated = [row for row in new if len(row) < max_new_tokens and not self.is_ended(row)]
        if truncated and (limit := self.reader.row_limit) is not None:
            if not self.ended_at_positions[self.name]:
                logger.warning(
                    "max_new_tokens: expected answers that end within the %d tokens that %s reads, "
                    "got %d that are cut off there. Shorten the prompts%s",
                    limit.tokens,
                    limit.reader,
                    len(truncated),
                    limit.hint,
                )
            self.ended_at_positions[self.name] += len(truncated)
        return new

    @property
    def ends(self) -> list[int]:
        """Ids of tokens that end an answer."""
        return ends_of(self.model, self.tokenizer) if self._ends is None else self._ends

    def is_ended(self, new: Sequence[int]) -> bool:
        """Whether new tokens are a complete answer, not truncated at a limit."""
        return bool(new) and new[-1] in self.ends

    def text(self, new: Sequence[int]) -> str:
        """Returns the text of new tokens without special tokens.

        A special token of letters and digits only counts as a word: the tokenizer comes with the
        checkpoint and could otherwise hide text.
        """
        decode, special = self.tokenizer.decode, special_ids(self.tokenizer)
        visible = [i for i in new if i not in special or decode([i]).strip().isalnum()]
        return str(decode(visible))


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:  # (n, longest)
    """Returns rows of integers as a tensor, padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of equal tokens at the beginning of two rows."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def special_ends(model: Any, tokenizer: Any) -> list[int]:
    """Returns the end tokens of an untrusted checkpoint: special tokens and such marks only."""
    stated = ends_of(model, tokenizer)
    ordinary = ordinary_ends(stated, tokenizer)
    if ordinary:
        words = ", ".join(printable(repr(tokenizer.decode([i]))) for i in ordinary[:5])
        logger.warning(
            "generation_config.eos_token_id and the end of a turn in the chat template: expected "
            "special tokens of the tokenizer, got %d others (%s), which end no answer here. Pass "
            "ends=… to a Subject of the loaded model where they should",
            len(ordinary),
            words,
        )
    return [i for i in stated if i not in ordinary]


def to_subject(name: str, model: Any) -> Subject:
    """Returns a Subject unchanged, or loads a path; raises TypeError for anything else."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, (str, Path)):
        return Subject(StoredModel.from_path(model, role=name))
    raise TypeError(
        f"{name}: expected a Subject or the path of a checkpoint, got {type(model).__name__}. "
        "Wrap a loaded model: Subject(model, tokenizer)"
    )
