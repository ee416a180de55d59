"""An HTTP/1.1 protocol for uvicorn with a limit of connections and of the time of slow clients."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .request_guard import error_response
from .requests import RequestError

SECONDS = 10.0  # for the head of a request, and for the rest of a body that is no longer read
MAX_CONNECTIONS = 256  # that are served; as many more get status 503, and others are closed
_UNREAD_SECONDS, _UNREAD_BYTES = 60.0, 1 << 16  # a client must read this much in that time


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with time limits and a limit of connections.

    uvicorn has no time limit for the head of a request, nor for a client that does not read its
    answer. The application limits the time for a body while it reads it.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    _surplus: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * MAX_CONNECTIONS:
            transport.abort()
        elif len(self.connections) > MAX_CONNECTIONS and not self._close_an_idle_one():
            self.app = _refuse
            self._surplus = self.loop.call_later(SECONDS, transport.abort)
        self._watch()

    def _close_an_idle_one(self) -> bool:
        """Close the connection that has been idle for longest; return whether one was idle."""
        idle = [
            (one.timeout_keep_alive_task.when(), one)
            for one in self.connections
            if isinstance(one, H11Protocol)
            and one.timeout_keep_alive_task is not None
            and not one.transport.is_closing()
        ]
        if idle:
            min(idle, key=lambda pair: pair[0])[1].timeout_keep_alive_handler()
        return bool(idle)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        self._watch_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        for timer in (self._unread, self._surplus):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def _watch(self) -> None:
        """Start the timer while the client must send something; stop it otherwise."""
        state = self.conn.their_state
        if state is h11.IDLE:
            owes = self.cycle is None or bool(self.conn.trailing_data[0])
        else:
            owes = state is h11.SEND_BODY and self.cycle.response_complete
        if not owes:
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _watch_reader(self) -> None:
        """Start the timer while a part of an answer is unsent, also if the connection closes."""
        self._unread_bytes = self.transport.get_write_buffer_size()
        if self._unread is None and self._unread_bytes:
            self._unread = self.loop.call_later(_UNREAD_SECONDS, self._check_reader)

    def _check_reader(self) -> None:
        self._unread, left = None, self.transport.get_write_buffer_size()
        if left and left > self._unread_bytes - _UNREAD_BYTES:
            self.transport.abort()
        else:
            self._watch_reader()


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answer with status 503 when the request has arrived, so that its sender reads the answer."""
    while (await receive()).get("more_body"):
        pass
    message = f"the server has {MAX_CONNECTIONS} connections, retry later"
    error = RequestError(503, message, retry_after=2, close=True)
    await error_response(error)(scope, receive, send)
