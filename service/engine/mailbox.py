"""The wire between the two processes: length-prefixed msgpack frames over one stream socket, and an end for each process.

No meaning lives here, only bytes, types and bounds. `Mailbox` (threads) is the engine's end, used by `service/worker.py` and
the engine loop; `Line` (asyncio) is the end of the HTTP process, used by the engine client.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from service.engine.messages import Down, Unreadable, Up

MAX_FRAME_BYTES = 64 << 20
MAX_UNSENT_BYTES = 16 << 20
SOCKET_BUFFER_BYTES = 1 << 20
_READ_BYTES = 256 << 10
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()
_down_decoder: msgspec.msgpack.Decoder[Down] = msgspec.msgpack.Decoder(Down)
_up_decoder: msgspec.msgpack.Decoder[Up] = msgspec.msgpack.Decoder(Up)


class FrameError(Exception):
    """The peer announced a frame that no message of ours can be; the stream has lost its place and is of no use any more."""


def encode_frame(message: Down | Up) -> bytes:
    """Length, then msgpack. Raises: OverflowError or TypeError for a value that msgpack can't carry; FrameError when too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(body)} bytes is longer than {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameSplitter:
    """Cuts a byte stream into frames, whatever the pieces it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def split(self, data: bytes) -> list[bytes]:
        """The bodies of all frames that `data` completes. Raises: FrameError."""
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes was announced; the longest is {MAX_FRAME_BYTES}")
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            bodies.append(bytes(memoryview(buffer)[at + _LENGTH.size : end]))
            at = end
        del buffer[:at]
        return bodies


def decode_down(body: bytes) -> Down | Unreadable:
    """A message for the engine. One whose fields have wrong types becomes an `Unreadable` that names the request, if it can."""
    try:
        return _down_decoder.decode(body)
    except msgspec.DecodeError as error:
        return _salvage(body, str(error))


def _salvage(body: bytes, reason: str) -> Unreadable:
    try:
        fields = msgspec.msgpack.decode(body)
    except msgspec.DecodeError:
        fields = None
    fields = fields if isinstance(fields, dict) and fields.get("type") in ("Generate", "Picture") else {}
    request_id, num_choices = fields.get("request_id"), fields.get("num_choices", 1)
    return Unreadable(
        request_id=request_id if isinstance(request_id, str) else "",
        num_choices=num_choices if isinstance(num_choices, int) else 1,
        reason=reason,
    )


class Mailbox:
    """The engine's end. Two threads: one reads (so that the end of the peer is noticed while a step is stuck), one writes what
    the socket did not take at once (so that the loop never waits for the peer).

    on_lost is called from the reading thread when the peer is gone; the worker ends the process there.
    """

    def __init__(self, connection: socket.socket, *, on_lost: Callable[[], None]) -> None:
        self._connection = connection
        self._on_lost = on_lost
        self._inbox: queue.SimpleQueue[Down | Unreadable | None] = queue.SimpleQueue()
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        connection.setblocking(True)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self._threads = [
            threading.Thread(target=self._read, name="mailbox-read", daemon=True),
            threading.Thread(target=self._write, name="mailbox-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def receive(self, timeout_s: float | None) -> list[Down | Unreadable]:
        """Everything that has arrived. Waits for the first message: up to timeout_s, not at all for 0, without end for None.
        Empty when nothing came, or the peer is gone."""
        messages: list[Down | Unreadable] = []
        try:
            message = self._inbox.get(block=timeout_s != 0, timeout=timeout_s or None)
            while True:
                if message is not None:  # else somebody woke us: no end of what has arrived
                    messages.append(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass
        return messages

    def wake(self) -> None:
        """Ends a `receive` that waits, or the next one, with what has come until then. From any thread."""
        self._inbox.put(None)

    def send(self, message: Up) -> None:
        """Never waits. A lost peer is no error here: the reading thread tells."""
        frame: bytes | memoryview = encode_frame(message)
        with self._changed:
            if self._is_closed:
                return
            if not self._unsent_bytes:
                # The usual case costs one system call and wakes no thread.
                try:
                    sent = self._connection.send(frame, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    return
                frame = frame[sent:]
            if frame:
                self._unsent.append(bytes(frame))
                self._unsent_bytes += len(frame)
                self._changed.notify_all()

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def wait_for_room(self, timeout_s: float) -> bool:
        """Waits until less than MAX_UNSENT_BYTES are unsent: whoever produces asks first, so memory is bounded by it."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_closed or self._unsent_bytes < MAX_UNSENT_BYTES, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Waits until the socket has taken everything; False when it did not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_closed or not self._unsent_bytes, timeout_s)

    def close(self) -> None:
        """Ends both threads without telling on_lost."""
        self._end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._connection.close()

    def _end(self) -> bool:
        """True for the first call only."""
        with self._changed:
            was_closed, self._is_closed = self._is_closed, True
            self._changed.notify_all()
        if not was_closed:
            with contextlib.suppress(OSError):  # the peer may have been faster
                self._connection.shutdown(socket.SHUT_RDWR)
            self._inbox.put(None)
        return not was_closed

    def _read(self) -> None:
        splitter = FrameSplitter()
        try:
            while data := self._connection.recv(_READ_BYTES):
                for body in splitter.split(data):
                    self._inbox.put(decode_down(body))
        except (OSError, FrameError):
            pass  # both mean that nothing can come any more
        if self._end():
            self._on_lost()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._unsent_bytes)
                if self._is_closed:
                    return
                frame = self._unsent[0]
            try:
                self._connection.sendall(frame)
            except OSError:
                return  # the reading thread sees the end too, and tells
            with self._changed:
                self._unsent.popleft()
                self._unsent_bytes -= len(frame)
                self._changed.notify_all()


class Line(asyncio.Protocol):
    """The HTTP process's end, in its event loop. on_message is called for each message, all messages of one read in one go;
    on_lost once, when the engine's end is closed or talks nonsense."""

    def __init__(self, *, on_message: Callable[[Up], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._splitter = FrameSplitter()
        self._transport: asyncio.Transport | None = None

    def send(self, message: Down) -> None:
        """Raises: OverflowError, TypeError or FrameError for a message that can't be carried. A closed line drops it."""
        frame = encode_frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            messages = [_up_decoder.decode(body) for body in self._splitter.split(data)]
        except (FrameError, msgspec.DecodeError):
            self.close()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
