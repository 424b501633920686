"""One TCP connection: uvicorn's h11 protocol, without Nagle's delay and with what it lacks: time limits for half a header, for a body that
nobody waits for and for a client that does not read, and errors in the form of all others.

No ASGI here and no routes. Handed to uvicorn by the composition root.
"""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.errors import error_bytes
from service.errors import BraidError, DeadlineError, HeaderTooLargeError, RequestError


class TimedConnection(H11Protocol):
    """header_s: from a connection's first byte, or its opening, to the end of the header. linger_s: how long the rest of a body is thrown
    away once its request has been answered. write_s: how long a full send buffer may stay full. When one is over the connection is cut,
    which the app sees as a disconnect."""

    header_s = 9.0
    linger_s = 5.0
    write_s = 30.0
    _header_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does so only for sockets that name their protocol, which those accepted from ours don't. Without it a small write waits
        # for the peer's acknowledgement of the one before: up to 40 ms for every answer on a kept connection.
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._header_timer = self.loop.call_later(self.header_s, self._end_late_header)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.ERROR:
            return  # answered, and closing
        super().data_received(data)
        self._watch_header()
        self._watch_rest()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_header()
        self._watch_rest()

    def _watch_header(self) -> None:
        """The timer runs while a header has begun and is not whole; more drops of it do not start it anew."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()
        elif self._header_timer is None and self.conn.trailing_data[0]:
            self._header_timer = self.loop.call_later(self.header_s, self._end_late_header)

    def _watch_rest(self) -> None:
        """The timer runs while a request that has been answered is still being sent; uvicorn would read on for ever."""
        is_late = self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        if not is_late:
            self._stop_linger_timer()
        elif self._linger_timer is None:
            self._linger_timer = self.loop.call_later(self.linger_s, self.transport.abort)

    def _end_late_header(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(DeadlineError("the request's header did not arrive in time", code="request_timeout"))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What h11 can't read. Between two answers of a pipeline nothing can be said, so there the connection just ends."""
        is_long = len(self.conn.trailing_data[0]) > (self.config.h11_max_incomplete_event_size or 0)
        self._refuse(HeaderTooLargeError("the request's header is too large") if is_long else RequestError("this is no valid HTTP request"))
        self.transport.close()

    def _refuse(self, error: BraidError) -> None:
        """Answers without the app, where an answer is still possible."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or (self.cycle is not None and not self.cycle.response_complete):
            return
        body = error_bytes(error)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade may be ignored, and browsers and proxies ask for one all the time."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits until all is sent, for ever if the client never reads.
        self._write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_header_timer()
        self._stop_linger_timer()
        self._stop_write_timer()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_linger_timer(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
