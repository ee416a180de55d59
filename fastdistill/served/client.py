"""A teacher behind HTTP: vLLM, anything else with prompt_logprobs, or fastdistill serve."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend, checks
from ..fingerprint import tokenizer_fingerprint
from ..outputs import TopK
from ..packing import read_rows
from .connection import Connection, Refusal, Reply
from .described import TEACHER, Described
from .tempering import is_tempered
from .verdict import WrongAnswer, refuse_wrong
from .wire import read_choices, unpack

_TOKENS_PACKED, _TOKENS_JSON = 16384, 2048  # in one request
_ANY_ID = 1 << 31
_PROBED = 32  # tokens that the question about the temperature is about


def is_url(given: object) -> bool:
    """Whether this names a server, and not a folder or a model."""
    return isinstance(given, str) and given.startswith(("http://", "https://"))


class _Part(NamedTuple):
    """Rows of one request: positions first..last of the batch's attended tokens."""

    first: int
    last: int
    rows: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


class ServedTeacher:
    """A TopKTeacher whose model runs in a server, here or on another machine.

    Opening it asks the server what it serves. Every answer is checked before it is used. It may be
    pickled, and asked from several threads.

    Args:
        url: http://host:port or https://host:port. No proxy is used.
        model: by the name that the server knows it by; None is the first of those it lists.
        token: None is the environment's FASTDISTILL_TOKEN, or none.
        tokenizer: the teacher's, for the proof that ids mean the same to the student; refused where
            the server says that it has another.
        timeout: seconds for one request, from connecting to its answer's last byte.
        retries: how often a request without an answer (dropped, too slow, 429, 5xx) is sent again;
            ten take about two and a half minutes of waiting, enough for a server to restart.
        concurrency: requests under way at a time.
        tokens_per_request: a longer row goes alone. None: 16384; 2048 where answers are JSON.

    Raises:
        NoAnswer (a ConnectionError): the server gives none. ValueError: it refuses, serves no such
        model, or what it says cannot be.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        tokenizer: Any = None,
        timeout: float = 300.0,
        retries: int = 10,
        concurrency: int = 4,
        tokens_per_request: int | None = None,
    ) -> None:
        for name, value in (
            ("concurrency", concurrency),
            ("tokens_per_request", tokens_per_request),
        ):
            if value is not None and (isinstance(value, bool) or not 1 <= value == int(value)):
                checks.fail(name, "an integer above 0", repr(value))
        token = backend.served_token() if token is None else token
        self._http = Connection(url, token=token, timeout=timeout, retries=retries)
        self.url, self.concurrency = self._http.url, concurrency
        self.valid_vocab: int | None = None
        self.tokenizer = tokenizer
        self.name, self._said, self.described = self._models(model)
        usual = _TOKENS_JSON if self.described is None else _TOKENS_PACKED
        self.tokens_per_request = tokens_per_request or usual
        self._tempered: set[float] = set()
        if tokenizer is not None:
            self.refuse_tokenizer(tokenizer)

    def _models(self, wanted: str | None) -> tuple[str, dict[str, Any], Described | None]:
        body = self._asked("/v1/models").body
        try:
            said = json.loads(body)
            models = {str(entry["id"]): dict(entry) for entry in said["data"]}
        except (ValueError, KeyError, TypeError):
            raise WrongAnswer(f"{self.url}: expected a list of models, got {body[:80]!r}") from None
        name = next(iter(models), "") if wanted is None else wanted
        if name not in models:
            some = ", ".join(models) or "none"
            checks.fail("model", f"one that {self.url} serves ({some})", repr(name))
        own = said.get("fastdistill")
        return name, models[name], None if own is None else Described.read(own, self.url)

    @property
    def vocab_size(self) -> int | None:
        """Columns of the teacher's head; None where the server does not say."""
        return None if self.described is None else self.described.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        """Which teacher this is, for a cache: what our server says, or the model's name."""
        if self.described is not None:
            return self.described.identity
        return {"name": self.name, "root": self._said.get("root")}

    def close(self) -> None:
        """Close its connections; the next question opens them again."""
        self._http.close()

    def refuse_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError where the server says that ids mean something else to its teacher."""
        theirs = None if self.described is None else self.described.tokenizer_sha256
        if theirs is not None and tokenizer_fingerprint(tokenizer) != theirs:
            raise ValueError(
                f"tokenizer: expected that of {self.name} at {self.url}, got one in which tokens "
                "have other ids. Top-k distillation compares probabilities id by id: use a teacher "
                "and a student of one tokenizer"
            )

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        """The k likeliest next tokens at every attended position. Rows travel without padding.

        vLLM reads each row with one token more behind it, for an answer at the last position: rows
        may have two tokens less than its --max-model-len.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.
            k: at most what the server gives. temperature: T of softmax(logits / T); a server that
                does not honour it is refused.

        Returns:
            TopK on input_ids' device: ids int64 [B, T, k], logprobs and log_tail fp32 (fp64 from a
            teacher in fp64). The tail is exact from fastdistill serve, else 1 − Σ p, at least 2⁻²⁴.
            Where attention_mask is 0 the payload is empty.

        Raises:
            ValueError or TypeError naming the argument. WrongAnswer (a ValueError): what came is no
            answer, by row and position. NoAnswer (a ConnectionError): nothing came.
        """
        checks.positive("temperature", temperature)
        rows = read_rows(input_ids, attention_mask, self.vocab_size or _ANY_ID)
        self._check_k(k)
        parts = self._parts(rows.tokens.tolist(), rows.lengths)
        if temperature != 1.0 and parts:
            self._refuse_ignored(parts[0].rows[0], temperature)
        found = self._together(parts, k, temperature)
        dtype = found[0].logprobs.dtype if found else torch.float32
        answers = TopK.empty((*rows.shape, k), float(temperature), dtype=dtype)
        where = rows.where.cpu()
        for part, answer in zip(parts, found, strict=True):
            answers.put(where[part.first : part.last], answer)
        if self.valid_vocab is not None:
            answers = answers.within(self.valid_vocab)
        return answers.to(input_ids.device)

    def _check_k(self, k: int) -> None:
        vocab, most = self.vocab_size or _ANY_ID, _ANY_ID
        if self.described is not None:
            most = self.described.max_k
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(vocab, most):
            hint = f"start fastdistill serve with max_k={k}" if most < vocab else ""
            checks.fail("k", f"an integer in 1..{min(vocab, most)} ({self.url})", repr(k), hint)

    def _parts(self, tokens: list[int], lengths: list[int]) -> list[_Part]:
        budget = self.tokens_per_request
        if self.described is not None:
            budget = min(budget, self.described.max_tokens)
        parts: list[_Part] = []
        for start, length in zip(accumulate([0, *lengths[:-1]]), lengths, strict=True):
            row = tokens[start : start + length]
            if not row:
                continue
            if parts and start + length - parts[-1].first <= budget:
                parts[-1] = _Part(parts[-1].first, start + length, [*parts[-1].rows, row])
            else:
                parts.append(_Part(start, start + length, [row]))
        return parts

    def _together(self, parts: Sequence[_Part], k: int, temperature: float) -> list[TopK]:
        stop = threading.Event()
        if len(parts) < 2 or self.concurrency == 1:
            return [self._answer(part, k, temperature, stop) for part in parts]
        with ThreadPoolExecutor(min(self.concurrency, len(parts))) as pool:
            waiting = [pool.submit(self._answer, part, k, temperature, stop) for part in parts]
            try:
                for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._http.interrupt()
                raise
            return [future.result() for future in waiting]

    def _answer(self, part: _Part, k: int, temperature: float, stop: threading.Event) -> TopK:
        said: dict[str, Any] = {"model": self.name, "temperature": float(temperature)}
        if self.described is not None:
            reply = self._asked("/v1/topk", said | {"prompt": part.rows, "k": k}, stop)
            self._refuse_another_teacher(reply)
            answer = unpack(reply.body, float(temperature), self.url)
        else:
            # What follows the last token decides nothing before it: any token does.
            said |= {"prompt": [[*row, row[-1]] for row in part.rows]}
            said |= {"max_tokens": 1, "prompt_logprobs": k}
            reply = self._asked("/v1/completions", said, stop, k)
            answer = read_choices(reply.body, part.lengths, k, float(temperature), self.url)
        refuse_wrong(answer, k=k, vocab=self.vocab_size, lengths=part.lengths, url=self.url)
        return answer

    def _refuse_another_teacher(self, reply: Reply) -> None:
        assert self.described is not None
        if reply.headers.get(TEACHER) != self.described.digest:
            raise WrongAnswer(
                f"{self.url}: expected the teacher that answered at first "
                f"({self.described.identity.get('name')}), got answers of another one. Was the "
                "server started again with another model? Open a new ServedTeacher"
            )

    def _refuse_ignored(self, row: list[int], temperature: float) -> None:
        honours = self.described is not None and self.described.honours_temperature
        if honours or temperature in self._tempered:
            return
        part = _Part(0, len(row[:_PROBED]), [row[:_PROBED]])
        plain, tempered = (self._answer(part, 2, T, threading.Event()) for T in (1.0, temperature))
        if not is_tempered(plain, tempered, temperature):
            raise ValueError(
                f"temperature: expected 1, since {self.url} ignores it for prompt_logprobs (asked "
                f"at 1 and at {temperature:g}, its answers do not differ as they have to), got "
                f"{temperature:g}. Use temperature=1, a TeacherCache built with temperatures=(1, "
                f"{temperature:g}) from the model itself, or fastdistill serve"
            )
        self._tempered.add(temperature)

    def _asked(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        stop: threading.Event | None = None,
        k: int = 0,
    ) -> Reply:
        try:
            return self._http.ask(path, body, stop=stop)
        except Refusal as refusal:
            limit = re.search(r"greater than max allowed: (\d+)", refusal.said)
            if limit:
                checks.fail("k", f"at most {limit[1]}, what {self.url} gives", k,
                            f"start vLLM with --max-logprobs {k}")  # fmt: skip
            if refusal.status in (401, 403):
                raise ValueError(
                    f"token: expected the one that {self.url} was started with, and it refuses "
                    f"what came ({refusal.said}). Pass token=, or set FASTDISTILL_TOKEN"
                ) from None
            raise
