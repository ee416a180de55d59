"""The ASGI application: who may ask, what comes in, what goes out."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from textwrap import shorten
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..outputs import TopK
from ..teacher import Teacher
from .described import TEACHER, Described
from .requests import Limits, Question, Refused, completion_question, packed_question
from .wire import entries, pack
from .worker import Answered, Full, Worker

_BYTES_PER_TOKEN, _BYTES_BESIDE = 16, 1 << 16  # of a request's body
_LOOKED = 1.0  # seconds between looks whether the client is still there


class Application:
    """The routes around one teacher; `starlette` is what a server runs."""

    def __init__(
        self, teacher: Teacher, described: Described, *, name: str, token: str | None
    ) -> None:
        self.described, self.name = described, name
        self._limits = Limits(
            name=name,
            vocab=min(described.vocab_size, teacher.reader.vocab),
            max_k=described.max_k,
            max_tokens=described.max_tokens,
        )
        self._token = None if token is None else f"Bearer {token}".encode()
        self._tokenizer = teacher.tokenizer
        self._created = int(time.time())
        self._worker = Worker(teacher, 4 * described.max_tokens)
        self.starlette = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/topk", self.topk, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            exception_handlers={Refused: _refused, HTTPException: _no_route, Exception: _failed},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._worker.close)

    async def health(self, _: Request) -> Response:
        return Response()

    async def models(self, request: Request) -> Response:
        self._admit(request)
        entry = {"id": self.name, "object": "model", "created": self._created,
                 "owned_by": "fastdistill", "root": self.name, "parent": None}  # fmt: skip
        said = {"object": "list", "data": [entry], "fastdistill": self.described.as_json()}
        return JSONResponse(said)

    async def topk(self, request: Request) -> Response:
        question = packed_question(await self._said(request), self._limits)
        answers = await self._answers(request, question)
        body = await run_in_threadpool(_packed, answers)
        headers = {TEACHER: self.described.digest}
        return Response(body, media_type="application/octet-stream", headers=headers)

    async def completions(self, request: Request) -> Response:
        said = await self._said(request)
        question = completion_question(said, self._limits)
        answers = await self._answers(request, question)
        most = said.get("max_tokens", 1)
        body = await run_in_threadpool(self._completion, question, answers, most)
        return Response(body, media_type="application/json")

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._token is not None and not hmac.compare_digest(given, self._token):
            raise Refused(401, "token: expected the one this server was started with", "token")

    async def _said(self, request: Request) -> dict[str, Any]:
        self._admit(request)
        # A web page in a browser can send a form here, but not JSON.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refused(415, "Content-Type: expected application/json")
        limit = self.described.max_tokens * _BYTES_PER_TOKEN + _BYTES_BESIDE
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise Refused(413, f"body: expected at most {limit} bytes", "prompt")
        try:
            said = await run_in_threadpool(json.loads, body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"body: expected JSON, got {error}") from None
        if not isinstance(said, dict):
            raise Refused(400, f"body: expected a JSON object, got {type(said).__name__}")
        return said

    async def _answers(self, request: Request, question: Question) -> list[Answered]:
        try:
            waiting = asyncio.wrap_future(self._worker.submit(question))
        except Full:
            raise Refused(503, "the queue is full, ask again", retry_after=2) from None
        while not (await asyncio.wait({waiting}, timeout=_LOOKED))[0]:
            if await request.is_disconnected():
                waiting.cancel()
                raise ClientDisconnect
        if waiting.cancelled():
            raise Refused(503, "the server is stopping", retry_after=2)
        error = waiting.exception()
        if error is not None:
            wrong = isinstance(error, (ValueError, TypeError, IndexError))
            said = shorten(f"the teacher failed: {type(error).__name__}: {error}", 300)
            raise Refused(400 if wrong else 500, said)
        return waiting.result()

    def _completion(self, question: Question, answers: list[Answered], most: int) -> bytes:
        words: dict[int, str | None] = {}

        def word(token: int) -> str | None:
            if token not in words:
                decode = getattr(self._tokenizer, "decode", None)
                words[token] = None if decode is None else decode([token])
            return words[token]

        choices = []
        for index, (row, answer) in enumerate(zip(question.rows, answers, strict=True)):
            best, logprobs, ranks = answer
            next_token = int(best.ids[-1, best.logprobs[-1].argmax()])
            given = entries(best, row, logprobs, ranks, word) if question.own_tokens else None
            choices.append({
                "index": index, "text": (word(next_token) or "") if most else "",
                "logprobs": None, "finish_reason": "length", "stop_reason": None,
                "prompt_logprobs": given,
            })  # fmt: skip
        made = most * len(choices)
        usage = {"prompt_tokens": question.tokens, "completion_tokens": made,
                 "total_tokens": question.tokens + made}  # fmt: skip
        said = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion",
                "created": int(time.time()), "model": self.name, "choices": choices,
                "usage": usage}  # fmt: skip
        return json.dumps(said).encode()


def _packed(answers: list[Answered]) -> bytes:
    best = [answer.best for answer in answers]
    ids, logprobs, tails = zip(*(b[:3] for b in best), strict=True)
    return pack(TopK(torch.cat(ids), torch.cat(logprobs), torch.cat(tails)))


async def _refused(_: Request, error: Any) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.as_json(), error.status, headers)


async def _no_route(request: Request, error: Any) -> Response:
    return JSONResponse(Refused(error.status_code, f"{request.url.path}: {error.detail}").as_json(),
                        error.status_code)  # fmt: skip


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, f"{type(error).__name__}").as_json(), 500)
