"""A client for teachers over HTTP: vLLM-compatible servers and fastdistill serve."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...hf.positions import RowLimit
from ...hf.row_reader import Rows, read_rows
from ...hf.tokenizers import tokenizer_fingerprint
from ...losses.types import TopK
from ...runtime import backend, checks
from ...runtime.printable import printable
from ..scored_ids import check_scored_ids
from .connection import LARGEST, Connection, Refusal
from .model_list import Listing, limit_of_vllm
from .probing import LOGITS, are_logits, is_tempered
from .requests import MAX_SCORED_IDS
from .response_checks import WrongAnswer, check_answer
from .server_info import TEACHER
from .token_scores import read_scores, scores_request
from .wire_format import NoPromptLogprobs, read_choices, unpack

_TOKENS_PACKED, _TOKENS_JSON = 16384, 2048  # in one request
_ANY_ID = 1 << 31
_PROBE_TOKENS = 32  # length of the row that tests the temperature
_PROBE_ROW = [0, 1] * 4  # valid in every vocabulary; real models soon predict the repetition
_TOO_LONG = re.compile(r"maximum (?:context|model) length (?:is|of) (\d{1,9})\b")
_ENTRY_JSON, _ENTRY_PACKED = 512, 16  # upper bounds for the bytes of one log-probability


class _Part(NamedTuple):
    """Rows of one request, by their index in the batch; `first` among the attended tokens.

    ids [n, K]: the ids to score at their n tokens; None asks for the k likeliest.
    """

    first: int
    rows: dict[int, list[int]]
    ids: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows.values()]

    @property
    def where(self) -> slice:
        """The attended tokens of the batch that these rows hold."""
        return slice(self.first, self.first + sum(self.lengths))


class ServedTeacher:
    """A TopKTeacher whose model runs in a server.

    The constructor requests the list of models and, unless the server is fastdistill serve, the
    answers to one short row, which must be prompt_logprobs and not logits. Every answer is checked
    before use. It can be pickled and used by several threads.

    Args:
        url: http://host:port or https://host:port. No proxy is used.
        model: its name on the server; None is the first one listed.
        token: None is the environment's FASTDISTILL_TOKEN, or none.
        tokenizer: the teacher's, which is compared with the student's, and with the server's if
            that is known.
        timeout: seconds for one request, from connecting to its answer's last byte.
        retries: how often a request without an answer (dropped, too slow, 429, 5xx) is sent again;
            ten take about two and a half minutes, enough for a server to restart. An address that
            never answered is abandoned after a few seconds.
        concurrency: number of simultaneous requests.
        tokens_per_request: a longer row is sent alone. None: 16384; 2048 if answers are JSON.

    Raises:
        NoAnswer (a ConnectionError): the server does not answer. ValueError: it rejects the
        request, does not serve the model, or sends an invalid answer.
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
        checks.integer("concurrency", concurrency, 1)
        checks.integer("tokens_per_request", tokens_per_request, 1, optional=True)
        token = backend.served_token() if token is None else token
        self._http = Connection(url, token=token, timeout=timeout, retries=retries)
        self.url, self.concurrency = self._http.url, concurrency
        self.valid_vocab: int | None = None
        self.tokenizer = tokenizer
        self.listing = Listing.read(self._http.ask("/v1/models").body, model, self.url)
        self.name, self.server_info = self.listing.name, self.listing.server_info
        usual = _TOKENS_JSON if self.server_info is None else _TOKENS_PACKED
        self.tokens_per_request = tokens_per_request or usual
        self._tempered: set[float] = set()
        self._scores_ids = self.server_info is not None
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        if self.server_info is None:
            self._check_first_answer()

    def _check_first_answer(self) -> None:
        """Raise ValueError if the answers of this server cannot be used."""
        row = _PROBE_ROW[: self.max_row_length]
        if not row:
            return
        try:
            self._read_answer(_Part(0, {0: row}), 2, 1.0, threading.Event())
        except Refusal as refusal:
            if refusal.status in (404, 405, 501):
                expected = "an answer to /v1/completions"
            elif "prompt_logprobs" in refusal.message and "max allowed" not in refusal.message:
                expected = "prompt_logprobs"
            else:
                return  # it concerns k or the length, which may differ in later requests
            reason = f"expected {expected}, got status {refusal.status}: {refusal.message}"
            raise self.listing.without_prompt_logprobs(reason) from None

    @property
    def vocab_size(self) -> int | None:
        """The number of the teacher's logits; None if unknown."""
        return None if self.server_info is None else self.server_info.vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        """The identity that a cache records, from fastdistill serve, or the name of the model."""
        if self.server_info is not None:
            return self.server_info.identity
        root = self.listing.entry.get("root")
        return {"name": self.name, "root": root if isinstance(root, str) else None}

    @property
    def row_limit(self) -> RowLimit | None:
        """The longest row that the server answers; None if unknown."""
        return self.listing.row_limit

    @property
    def max_row_length(self) -> int | None:
        """The number of tokens of the longest row that the server answers; None if unknown."""
        return None if self.row_limit is None else self.row_limit.tokens

    def check(self, *, k: int, temperature: float) -> None:
        """Request one short row; raise ValueError if k or temperature is not supported."""
        row = _PROBE_ROW[: self.max_row_length]
        if row:
            self.topk(torch.tensor([row]), k=k, temperature=temperature)

    def close(self) -> None:
        """Close the connections; the next request reopens them."""
        self._http.close()

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError if the server's tokenizer is known and differs."""
        own_digest = tokenizer_fingerprint(tokenizer)
        server_digest = None if self.server_info is None else self.server_info.tokenizer_sha256
        if server_digest is not None and own_digest != server_digest:
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
        """Return the k likeliest next tokens at every attended position. Rows are sent unpadded.

        For vLLM one token is appended to each row, to get an answer at the last position. Rows may
        have at most --max-model-len − 2 tokens.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.
            k: at most the server's limit. temperature: T of softmax(logits / T); the server must
                apply it.

        Returns:
            TopK on input_ids' device: ids int64 [B, T, k], logprobs and log_tail fp32 (fp64 from a
            teacher in fp64). The tail is exact from fastdistill serve, else 1 − Σ p, at least 2⁻²⁴.
            Where attention_mask is 0 the payload is empty.

        Raises:
            ValueError or TypeError naming the argument. WrongAnswer (a ValueError): an invalid
            answer, with row and position. NoAnswer (a ConnectionError): no answer.
        """
        checks.positive("temperature", temperature)
        rows = read_rows(input_ids, attention_mask, self.vocab_size or _ANY_ID)
        self._check_k(k)
        parts = self._parts(rows, self.tokens_per_request)
        if temperature != 1.0 and parts:
            self._check_temperature(next(iter(parts[0].rows.values())), temperature)
        answers = self._answer_all(rows, parts, k, temperature)
        if self.valid_vocab is not None:
            answers = answers.within(self.valid_vocab)
        return answers.to(input_ids.device)

    def logprobs_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None,  # (B, T)
        ids: Tensor,  # (B, T, K)
        *,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        """Return the log-probabilities of given next tokens, as `Teacher.logprobs_at` does.

        fastdistill serve scores given ids. vLLM 0.32 does so with --enable-scale-out, at
        temperature 1, with one request for each row. `check_scores_ids` raises for other servers.
        """
        self.check_scores_ids("ids")
        checks.positive("temperature", temperature)
        vocab = self.vocab_size or _ANY_ID
        rows = read_rows(input_ids, attention_mask, vocab)
        check_scored_ids(ids, rows, vocab)
        slots = ids.shape[-1]
        budget = min(self.tokens_per_request, max(1, MAX_SCORED_IDS // slots))
        scored = ids.flatten(0, 1)[rows.where.to(ids.device)].cpu().long()
        parts = self._parts(rows, budget if self.server_info is not None else 1, scored)
        if temperature != 1.0 and parts:
            self._check_temperature(next(iter(parts[0].rows.values())), temperature)
        return self._answer_all(rows, parts, slots, temperature).to(input_ids.device)

    def check_scores_ids(self, name: str) -> None:
        """Raise ValueError, for the argument `name`, unless the server scores given ids.

        A server other than fastdistill serve gets one request, with one token.
        """
        if self._scores_ids:
            return
        part = _Part(0, {0: _PROBE_ROW[:1]}, torch.tensor([_PROBE_ROW[:1]]))
        try:
            self._read_answer(part, 1, 1.0, threading.Event())
        except (Refusal, WrongAnswer) as error:
            got = error.message if isinstance(error, Refusal) else str(error)
            raise ValueError(
                f"{name}: expected a server that scores given ids, got {self.url}, which does not "
                f"({got}). Start vLLM 0.32 or newer on a GPU with --enable-scale-out, or serve the "
                "model with fastdistill serve"
            ) from None
        self._scores_ids = True

    def _check_k(self, k: int) -> None:
        vocab = self.vocab_size or _ANY_ID
        max_k = _ANY_ID if self.server_info is None else self.server_info.max_k
        if type(k) is not int or not 1 <= k <= min(vocab, max_k):
            hint = f"start fastdistill serve with max_k={k}" if max_k < vocab else ""
            checks.fail("k", f"an integer in 1..{min(vocab, max_k)} ({self.url})", repr(k), hint)

    def _parts(self, rows: Rows, budget: int, ids: Tensor | None = None) -> list[_Part]:
        """Check the lengths of rows, and share them out among requests."""
        if self.server_info is not None:
            budget = min(budget, self.server_info.max_tokens)
        tokens = rows.tokens.tolist()
        parts: list[_Part] = []
        ends = accumulate(rows.lengths)
        for number, (length, last) in enumerate(zip(rows.lengths, ends, strict=True)):
            if self.row_limit is not None:
                self.row_limit.check(length, "input_ids", number)
            row = tokens[last - length : last]
            if row and parts and last - parts[-1].first <= budget:
                parts[-1].rows[number] = row
            elif row:
                parts.append(_Part(last - length, {number: row}))
        if ids is None:
            return parts
        return [part._replace(ids=ids[part.where]) for part in parts]

    def _answer_all(self, rows: Rows, parts: Sequence[_Part], k: int, temperature: float) -> TopK:
        """Return the answers [B, T, k] to all requests."""
        part_answers = self._ask_all(parts, k, temperature)
        dtype = part_answers[0].logprobs.dtype if part_answers else torch.float32
        answers = TopK.empty((*rows.shape, k), float(temperature), dtype=dtype)
        where = rows.where.cpu()
        for part, answer in zip(parts, part_answers, strict=True):
            answers.put(where[part.where], answer)
        return answers

    def _ask_all(self, parts: Sequence[_Part], k: int, temperature: float) -> list[TopK]:
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
        """Return a checked answer; known refusals of vLLM name the caller's argument."""
        try:
            return self._read_answer(part, k, temperature, stop)
        except Refusal as refusal:
            if match := _TOO_LONG.search(refusal.message):
                limit = limit_of_vllm(self.url, int(match[1]))
                for number, row in part.rows.items():
                    limit.check(len(row), "input_ids", number)
            if match := re.search(r"greater than max allowed: (\d{1,9})\b", refusal.message):
                expected = f"at most {match[1]}, what {self.url} gives"
                name = "k" if part.ids is None else "ids"
                checks.fail(name, expected, k, f"start vLLM with --max-logprobs {k}")
            raise

    def _read_answer(self, part: _Part, k: int, temperature: float, stop: threading.Event) -> TopK:
        if self.server_info is not None:
            answer = self._read_packed(part, k, temperature, stop)
        elif part.ids is not None:
            (row,) = part.rows.values()
            payload = {"model": self.name, **scores_request(row, part.ids)}
            reply = self._http.ask("/inference/v1/generate", payload, stop=stop)
            answer = read_scores(reply.body, part.ids, float(temperature), self.url)
        else:
            answer = self._read_json(part, k, temperature, stop)
        is_suspect = self.server_info is None and part.ids is None and are_logits(answer)
        try:
            check_answer(
                answer,
                k=k,
                vocab=self.vocab_size,
                lengths=part.lengths,
                url=self.url,
                scored=part.ids,
            )
        except WrongAnswer as error:
            raise WrongAnswer(f"{error}. {LOGITS}" if is_suspect else str(error)) from None
        if is_suspect:
            raise WrongAnswer(
                f"{self.url}: expected log-probabilities of all tokens that sum to 1, got numbers "
                f"too small for that ({answer.logprobs.max():g} at most). {LOGITS}"
            )
        return answer

    def _read_packed(self, part: _Part, k: int, temperature: float, stop: threading.Event) -> TopK:
        """Return the answer of fastdistill serve."""
        assert self.server_info is not None
        rows = list(part.rows.values())
        payload: dict[str, Any] = {"model": self.name, "temperature": float(temperature)}
        payload |= {"prompt": rows, "k": k}
        if part.ids is not None:
            payload |= {"k": None, "ids": [x.tolist() for x in part.ids.split(part.lengths)]}
        limit = LARGEST + _entries(part, k) * _ENTRY_PACKED
        reply = self._http.ask("/v1/topk", payload, stop=stop, limit=limit)
        if reply.headers.get(TEACHER) != self.server_info.digest:
            name = printable(self.server_info.identity.get("name"))
            raise WrongAnswer(
                f"{self.url}: expected the teacher that answered at first ({name}), got "
                "answers of another one. If the server was started again with another model, open "
                "a new ServedTeacher"
            )
        return unpack(reply.body, float(temperature), self.url)

    def _read_json(self, part: _Part, k: int, temperature: float, stop: threading.Event) -> TopK:
        """Return the answer of vLLM."""
        # The appended token does not affect the answers, so any token will do.
        prompts = [[*row, row[-1]] for row in part.rows.values()]
        payload = {
            "model": self.name,
            "temperature": float(temperature),
            "prompt": prompts,
            "max_tokens": 1,
            "prompt_logprobs": k,
        }
        limit = LARGEST + _entries(part, k) * _ENTRY_JSON
        reply = self._http.ask("/v1/completions", payload, stop=stop, limit=limit)
        try:
            return read_choices(reply.body, prompts, k, float(temperature), self.url)
        except NoPromptLogprobs as error:
            raise self.listing.without_prompt_logprobs(str(error)) from None

    def _check_temperature(self, row: list[int], temperature: float) -> None:
        honors = self.server_info is not None and self.server_info.honours_temperature
        if honors or temperature in self._tempered:
            return
        part = _Part(0, {0: row[:_PROBE_TOKENS]})
        plain, tempered = (self._answer(part, 2, T, threading.Event()) for T in (1.0, temperature))
        if not is_tempered(plain, tempered, temperature):
            raise ValueError(
                f"temperature: expected 1, since {self.url} ignores it for prompt_logprobs (its "
                f"answers at 1 and at {temperature:g} do not differ as they should), got "
                f"{temperature:g}. Use temperature=1, a TeacherCache built with temperatures=(1, "
                f"{temperature:g}) from the model itself, or fastdistill serve"
            )
        self._tempered.add(temperature)


def _entries(part: _Part, k: int) -> int:
    """Return an upper bound for the number of log-probabilities in an answer."""
    return (sum(part.lengths) + len(part.rows)) * (k + 1)
