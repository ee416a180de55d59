"""A thread that owns the teacher and answers queued questions in batches."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...hf.row_reader import groups
from ...losses.linear_head import linear_lse_gather
from ...losses.scores import token_scores
from ...losses.types import TopK
from ..local import Teacher
from .requests import Question

logger = logging.getLogger(__name__)

_TOKENS = 16384  # per batch, padding included; the Teacher regroups them by its own budget


class Full(Exception):
    """The queue is full."""


class NotNumbers(ValueError):
    """The teacher's log-probabilities are NaN: the temperature is too small, or weights are NaN."""


class RowAnswer(NamedTuple):
    """A row's answers [n, K], and the logprob and rank (from 1) of its own tokens 1..n−1.

    The latter are zeros unless the question has own_tokens."""

    best: TopK
    logprobs: list[float]
    ranks: list[int]


class _Waiting(NamedTuple):
    question: Question
    future: Future[list[RowAnswer]]


class Worker:
    """Answers questions in order, batched with later ones of the same kind.

    Args:
        teacher: used by one thread only.
        waiting: number of tokens that may be queued.
    """

    def __init__(self, teacher: Teacher, waiting: int) -> None:
        self._teacher, self._limit = teacher, waiting
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Cancel queued questions and return when the current one is answered."""
        with self._changed:
            self._closed = True
            for waiting in list(self._queue):
                waiting.future.cancel()
            self._changed.notify()
        self._thread.join()

    def submit(self, question: Question) -> Future[list[RowAnswer]]:
        """Queue a question; raise Full if there is no room. Cancelling the future withdraws it."""
        future: Future[list[RowAnswer]] = Future()
        future.add_done_callback(self._withdraw)
        with self._changed:
            before = sum(waiting.question.tokens for waiting in self._queue)
            if self._closed or (self._queue and before + question.tokens > self._limit):
                raise Full
            self._queue.append(_Waiting(question, future))
            self._changed.notify()
        return future

    def _withdraw(self, future: Future[list[RowAnswer]]) -> None:
        if future.cancelled():
            with self._changed:
                self._queue = deque(w for w in self._queue if w.future is not future)

    def _run(self) -> None:
        while batch := self._next():
            batch = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if batch:
                self._serve(batch)

    def _next(self) -> list[_Waiting]:
        """Return the next batch: the first question and matching ones that fit; [] when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return []
            batch = [self._queue.popleft()]
            size = batch[0].question.tokens
            for other in list(self._queue):
                alike = other.question.kind == batch[0].question.kind
                if alike and size + other.question.tokens <= _TOKENS:
                    size += other.question.tokens
                    batch.append(other)
                    self._queue.remove(other)
            return batch

    def _serve(self, batch: list[_Waiting]) -> None:
        rows = [row for waiting in batch for row in waiting.question.rows]
        scored = [ids for waiting in batch for ids in waiting.question.ids or ()]
        try:
            answers = self._answers(rows, scored, batch[0].question)
        except Exception as error:
            if len(batch) > 1:  # one of them may be the reason
                for waiting in batch:
                    self._serve([waiting])
            else:
                log = logger.error if isinstance(error, NotNumbers) else logger.exception
                log("the teacher failed on %d tokens", batch[0].question.tokens)
                batch[0].future.set_exception(error)
            return
        for waiting in batch:
            waiting.future.set_result(answers[: len(waiting.question.rows)])
            answers = answers[len(waiting.question.rows) :]

    def _answers(
        self, rows: list[list[int]], scored: list[list[list[int]]], question: Question
    ) -> list[RowAnswer]:
        by_row: dict[int, RowAnswer] = {}
        for group in groups([len(row) for row in rows], _TOKENS, False, float("inf")):
            group.sort()
            tokens = [torch.tensor(rows[i]) for i in group]
            ids = pad_sequence(tokens, batch_first=True)
            mask = pad_sequence([torch.ones_like(t).bool() for t in tokens], batch_first=True)
            T = question.temperature
            if question.ids is None:
                best = self._teacher.topk(ids, mask, k=question.k, temperature=T)
            else:
                slots = pad_sequence([torch.tensor(scored[i]) for i in group], batch_first=True)
                best = self._teacher.logprobs_at(ids, mask, slots, temperature=T)
            assert best.log_tail is not None
            if (best.logprobs.isnan().any(-1) | best.log_tail.isnan())[mask].any():
                raise NotNumbers(
                    f"expected numbers at temperature {question.temperature:g}, got NaN"
                )
            logprobs = torch.zeros(ids.shape, dtype=torch.float32)
            ranks = torch.zeros_like(ids)
            if question.own_tokens:
                self._own_tokens(ids, mask, best, logprobs, ranks)
            for b, i in enumerate(group):
                n = len(rows[i]) - 1
                row = best.at((b, mask[b]))
                by_row[i] = RowAnswer(row, logprobs[b, :n].tolist(), ranks[b, :n].tolist())
        return [by_row[i] for i in range(len(rows))]

    def _own_tokens(
        self, ids: Tensor, mask: Tensor, best: TopK, logprobs: Tensor, ranks: Tensor
    ) -> None:
        """Fill in logprob and rank of token t + 1 at t where it is not among the k."""
        following = ids.roll(-1, -1)
        selected = mask & mask.roll(-1, -1) & (best.ids != following[..., None]).all(-1)
        selected[:, -1] = False
        if not selected.any():
            return
        head, impl = self._teacher.head, self._teacher.impl
        hidden = self._teacher.hidden(ids, mask)[selected].to(head.weight.device)
        tokens = following[selected].to(hidden.device)
        stats = linear_lse_gather(
            hidden,
            head.weight,
            tokens[:, None],
            temperature=best.temperature,
            impl=impl,
            **head.options(),
        )
        scores = token_scores(hidden, head.weight, labels=tokens, impl=impl, **head.options())
        assert scores.label_rank is not None
        logprobs[selected] = (stats.logits[:, 0] - stats.lse).float().detach().cpu()
        ranks[selected] = scores.label_rank.long().cpu() + 1
