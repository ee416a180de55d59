"""The ASGI application of `fastdistill serve`: authentication, requests and responses."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...losses.types import TopK
from ...runtime.json_text import JSONError, parse_json
from ...runtime.printable import printable
from ..local import Teacher
from .completion import completion_json
from .request_guard import Guard, error_response
from .requests import (
    MAX_SCORED_IDS,
    Limits,
    Question,
    RequestError,
    check_model,
    completion_question,
    packed_question,
)
from .server_info import TEACHER, ServerInfo
from .wire_format import pack
from .worker import Full, NotNumbers, RowAnswer, Worker

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN, _BYTES_OVERHEAD = 16, 1 << 16  # of a request's body
_BYTES_PER_SCORED_ID = 10
_PIECE_SECONDS, _BODY_SECONDS = 10.0, 60.0  # limits for the next piece of a body, and for all of it
_MAX_WRITERS = 2  # JSON answers that are encoded at a time: each takes some hundred MB


class Application:
    """The routes around one teacher; `starlette` is what a server runs."""

    def __init__(
        self,
        teacher: Teacher,
        server_info: ServerInfo,
        *,
        name: str,
        token: str | None,
    ) -> None:
        row_limit = teacher.row_limit
        self.server_info, self.name = server_info, name
        self._limits = Limits(
            name=name,
            vocab=min(server_info.vocab_size, teacher.reader.vocab),
            head=server_info.vocab_size,
            max_k=server_info.max_k,
            max_tokens=server_info.max_tokens,
            max_row=None if row_limit is None else row_limit.tokens,
        )
        self._token = None if token is None else f"Bearer {token}".encode()
        self._tokenizer = teacher.tokenizer
        self._created = int(time.time())
        self._worker = Worker(teacher, 4 * server_info.max_tokens)
        self._writing = asyncio.Semaphore(_MAX_WRITERS)
        self.starlette = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/v1/topk", self.topk, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            middleware=[Middleware(Guard, only_loopback=token is None)],
            exception_handlers=dict.fromkeys(
                (RequestError, ClientDisconnect, HTTPException, Exception), _failed
            ),
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

    def _entry(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastdistill",
            "root": self.name,
            "parent": None,
            "max_model_len": self._limits.max_row,
        }

    async def models(self, request: Request) -> Response:
        self._check_token(request)
        info = self.server_info.as_json()
        return JSONResponse({"object": "list", "data": [self._entry()], "fastdistill": info})

    async def model(self, request: Request) -> Response:
        self._check_token(request)
        check_model(request.path_params["model"], self.name)
        return JSONResponse(self._entry())

    async def topk(self, request: Request) -> Response:
        ids = min(MAX_SCORED_IDS, 2 * self._limits.max_tokens * self._limits.max_k)
        body = await self._json_body(request, ids * _BYTES_PER_SCORED_ID)
        question = packed_question(body, self._limits)
        answers = await self._answers(request, question)
        packed = await run_in_threadpool(_packed, answers)
        headers = {TEACHER: self.server_info.digest}
        return Response(packed, media_type="application/octet-stream", headers=headers)

    async def completions(self, request: Request) -> Response:
        completion = completion_question(await self._json_body(request), self._limits)
        answers = await self._answers(request, completion.question)
        async with self._writing:
            if await request.is_disconnected():
                raise ClientDisconnect
            body = await run_in_threadpool(
                completion_json, completion, answers, name=self.name, tokenizer=self._tokenizer
            )
        return Response(body, media_type="application/json")

    def _check_token(self, request: Request) -> None:
        header = request.headers.get("authorization", "").encode()
        if self._token is not None and not hmac.compare_digest(header, self._token):
            raise RequestError(401, "token: expected the one this server was started with", "token")

    async def _json_body(self, request: Request, more_bytes: int = 0) -> dict[str, Any]:
        self._check_token(request)
        # A web page in a browser can send a form here, but not JSON.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise RequestError(415, "Content-Type: expected application/json")
        limit = self.server_info.max_tokens * _BYTES_PER_TOKEN + _BYTES_OVERHEAD
        limit += more_bytes
        try:
            body = await _body(request, limit)
        except (TimeoutError, asyncio.TimeoutError):
            message = "body: expected the whole body in time, got only a part"
            raise RequestError(408, message, close=True) from None
        try:
            return dict(await run_in_threadpool(parse_json, body, "body", dict, unique=True))
        except JSONError as error:
            raise RequestError(400, str(error)) from None

    async def _answers(self, request: Request, question: Question) -> list[RowAnswer]:
        try:
            waiting: asyncio.Future[Any] = asyncio.wrap_future(self._worker.submit(question))
        except Full:
            raise RequestError(503, "the queue is full, retry later", retry_after=2) from None
        leaving: asyncio.Future[Any] = asyncio.ensure_future(_left(request))
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not waiting.done():
            waiting.cancel()
            raise ClientDisconnect
        if waiting.cancelled():
            raise RequestError(503, "the server is stopping", retry_after=2)
        error = waiting.exception()
        if isinstance(error, NotNumbers) and question.temperature != 1.0:
            expected = "temperature: expected one at which the teacher's logprobs are finite"
            raise RequestError(400, f"{expected}, got {question.temperature:g}", "temperature")
        if error is not None:
            of_client = isinstance(error, (ValueError, TypeError, IndexError))
            status = 400 if of_client and not isinstance(error, NotNumbers) else 500
            message = f"the teacher failed: {type(error).__name__}: {printable(error)}"
            raise RequestError(status, message)
        return list(waiting.result())


async def _left(request: Request) -> None:
    """Return when the client leaves. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _packed(answers: list[RowAnswer]) -> bytes:
    best = [answer.best for answer in answers]
    ids, logprobs, tails = zip(*(b[:3] for b in best), strict=True)
    return pack(TopK(torch.cat(ids), torch.cat(logprobs), torch.cat(tails)))


async def _body(request: Request, limit: int) -> bytes:
    """Return the whole body; raise TimeoutError if it or its next piece is late.

    wait_for is around each piece. Around the loop it has no effect in Python 3.11: its cancellation
    is lost if a piece arrives at the same moment.
    """
    body, stream = bytearray(), request.stream().__aiter__()
    end = time.monotonic() + _BODY_SECONDS
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            body += await asyncio.wait_for(stream.__anext__(), min(_PIECE_SECONDS, left))
        except StopAsyncIteration:
            return bytes(body)
        if len(body) > limit:
            raise RequestError(413, f"body: expected at most {limit} bytes", "prompt")


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        logger.info("a client left before its answer to %s", printable(request.url.path))
        return Response(status_code=499)  # not delivered
    if isinstance(error, HTTPException):  # no such route
        served = ", ".join(route.path for route in request.app.routes)
        message = f"path: expected one of {served}, got {request.method} {request.url.path}"
        error = RequestError(error.status_code, f"{message} ({error.detail})")
    if not isinstance(error, RequestError):
        error = RequestError(500, type(error).__name__)
    return error_response(error)
