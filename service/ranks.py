"""The ranks of an engine that tensor parallelism splits: how the others are started, told what to compute, and watched.

No torch and no model here, only processes and plain values over a socket for each. `Ranks` is the side of rank 0, used by `worker`, and
`Seat` that of every other rank, used by `follower`. Whichever rank ends, the whole engine does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from service.engine.mailbox import SOCKET_BUFFER_BYTES
from service.engine.messages import Failed, Load
from service.errors import StartupError
from service.scheduling.plan import Slice

FOLLOWER = (sys.executable, "-m", "service.follower")
HOST = "127.0.0.1"
_LENGTH = struct.Struct(">I")
_EXIT_WAIT_S = 2.0
_PR_SET_PDEATHSIG = 1


class Join(msgspec.Struct, frozen=True, tag=True):
    """The first message to a rank: what the engine was told to load, which rank it is, and the port at which the ranks meet."""

    load: Load
    rank: int
    port: int


class Follow(msgspec.Struct, frozen=True, tag=True):
    """For the model of this index the slices of a step; or, without any, the logits of so many rows."""

    model_index: int
    slices: tuple[Slice, ...] = ()
    num_rows: int = 0


class Offer(msgspec.Struct, frozen=True, tag=True):
    """A rank's number where all have to agree on the least."""

    value: int


class Settled(msgspec.Struct, frozen=True, tag=True):
    """The least of all ranks' numbers."""

    value: int


Told = Join | Follow | Settled
Heard = Offer | Failed

_encoder = msgspec.msgpack.Encoder()
_told_decoder: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)
_heard_decoder: msgspec.msgpack.Decoder[Heard] = msgspec.msgpack.Decoder(Heard)


class Ranks:
    """Rank 0's view of the others, which are processes that it starts. on_lost: called once, from any thread, with words for people when
    one of them has ended or the ranks are out of step; nothing can be computed any more.

    port, listen_fd: where the ranks meet, a socket of this machine alone. Raises: StartupError.
    """

    rank = 0

    def __init__(self, load: Load, on_lost: Callable[[str], None], command: Sequence[str] = FOLLOWER) -> None:
        check_load(load)
        self.size = load.tensor_parallel
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._is_over = False
        listener = socket.create_server((HOST, 0), backlog=self.size)
        self.port: int = listener.getsockname()[1]
        self.listen_fd: int | None = listener.detach()
        self._others = [_start(command, Join(load, rank, self.port)) for rank in range(1, self.size)]
        self._offers: list[queue.SimpleQueue[int]] = [queue.SimpleQueue() for _ in self._others]
        for index in range(len(self._others)):
            threading.Thread(target=self._listen, args=(index,), name=f"rank-{index + 1}", daemon=True).start()

    def least(self, value: int) -> int:
        """The least of what all ranks say. Every rank has to ask, in the same order."""
        least = min(value, *(offers.get() for offers in self._offers))
        self._send(Settled(least))
        return least

    def tell(self, model_index: int, slices: tuple[Slice, ...], num_rows: int = 0) -> None:
        """Has the others do this; they begin at once. Raises: OSError when one is gone."""
        self._send(Follow(model_index, slices, num_rows))

    def give_up(self, message: str) -> None:
        """The engine can't go on, for this reason; only the first is told."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        if not was_over:
            self._on_lost(message)

    def close(self) -> None:
        """Ends the other ranks and waits until they are gone."""
        with self._lock:
            self._is_over = True
        for _, connection in self._others:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for process, connection in self._others:
            try:
                process.wait(_EXIT_WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            connection.close()

    def _send(self, message: Told) -> None:
        frame = _frame(message)
        for _, connection in self._others:
            connection.sendall(frame)

    def _listen(self, index: int) -> None:
        process, connection = self._others[index]
        message = f"rank {index + 1} of {self.size} ended unexpectedly"
        while (body := _read(connection)) is not None:
            heard = _heard_decoder.decode(body)
            if isinstance(heard, Failed):
                message = heard.message
                break
            self._offers[index].put(heard.value)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                message += f" (status {process.wait(_EXIT_WAIT_S)})"
        self.give_up(message)


class Seat:
    """The place of one of the other ranks, in its own process. It ends with its connection to rank 0, whatever it does at the time."""

    tell = None
    listen_fd: int | None = None

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        body = _read(connection)
        first = None if body is None else _told_decoder.decode(body)
        if not isinstance(first, Join):
            raise StartupError("the first message was not Join")
        self.load = first.load
        self.rank = first.rank
        self.size = first.load.tensor_parallel
        self.port = first.port
        threading.Thread(target=self._watch, name="rank-0", daemon=True).start()

    def least(self, value: int) -> int:
        """As `Ranks.least`."""
        self._connection.sendall(_frame(Offer(value)))
        message = self._receive()
        if not isinstance(message, Settled):
            raise RuntimeError(f"a {type(message).__name__} came where the least of all numbers was due")
        return message.value

    def next_step(self) -> Follow | None:
        """Waits for it; None when there will be no more."""
        message = self._receive()
        return message if isinstance(message, Follow) else None

    def give_up(self, message: str) -> None:
        """Tells rank 0 why this one can't go on."""
        with contextlib.suppress(OSError):
            self._connection.sendall(_frame(Failed(message)))

    def _receive(self) -> Told | None:
        body = _read(self._connection)
        return None if body is None else _told_decoder.decode(body)

    def _watch(self) -> None:
        """A rank may be stuck in a sum that will never come, or in a kernel: then nobody reads, and this alone ends it."""
        hangup = select.poll()
        hangup.register(self._connection, 0)  # the end of the other side is always told
        hangup.poll()
        os._exit(0)


def bind_life_to_parent() -> None:
    """Dies with the parent, however that ends, and leaves the answer to Ctrl-C and SIGTERM to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def check_load(load: Load) -> None:
    """Raises: StartupError for what can't be split, as far as flags tell; the rest is known when a model's config is."""
    flag = f"--tensor-parallel {load.tensor_parallel}"
    if load.draft is not None:
        raise StartupError(f"{flag} and --draft-model do not go together; leave one of them out")
    if load.dtype == "int4":
        raise StartupError(f"{flag} and --dtype int4 do not go together; a split model is float32, bfloat16, int8 or fp8")
    if ":" in load.device:
        raise StartupError(f"{flag} takes the first {load.tensor_parallel} GPUs and --device {load.device} names one; use --device cuda")


def _start(command: Sequence[str], join: Join) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    with theirs:
        try:
            process = subprocess.Popen([*command, "--fd", str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
        except OSError as error:
            raise StartupError(f"the process of rank {join.rank} could not be started") from error
    ours.sendall(_frame(join))
    return process, ours


def _frame(message: Told | Heard) -> bytes:
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def _read(connection: socket.socket) -> bytes | None:
    """The body of the next frame; None at the end."""
    try:
        head = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
        if len(head) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack(head)
        body = connection.recv(length, socket.MSG_WAITALL)
    except OSError:
        return None
    return body if len(body) == length else None
