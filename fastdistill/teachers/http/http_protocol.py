"""An HTTP/1.1 protocol for uvicorn that closes connections of slow clients."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 10.0  # for the head of a request, and for the rest of a body that is no longer read
_UNREAD = 60.0  # seconds in which a client may read nothing of its answer


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with time limits.

    uvicorn has no time limit for the head of a request. The application limits the time for a body
    while it reads it.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()
        self.resume_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(_UNREAD, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

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
