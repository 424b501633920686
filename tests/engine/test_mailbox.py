"""The wire: framing whatever the pieces, bounds, and how each end learns that the other is gone."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from service.engine import mailbox as wire
from service.engine.mailbox import FrameError, FrameSplitter, Line, Mailbox, decode_down, encode_frame
from service.engine.messages import Abort, Beat, Delivery, Event, Failed, Progress, Shutdown, TokenLogprob, Unreadable, Up, Usage
from tests.fakes import generate


@pytest.fixture
def ends() -> Iterator[tuple[Mailbox, socket.socket, threading.Event]]:
    ours, theirs = socket.socketpair()
    lost = threading.Event()
    mailbox = Mailbox(ours, on_lost=lost.set)
    yield mailbox, theirs, lost
    mailbox.close()
    theirs.close()


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 64, 10_000])
def test_frames_survive_any_cut(piece: int) -> None:
    messages = [generate("a", range(300), seed=2**63 - 1), Abort("a", 1, True), Shutdown(), generate("é☃", [7], logit_bias=((3, -1.5),))]
    data = b"".join(map(encode_frame, messages))
    splitter = FrameSplitter()
    bodies = [body for at in range(0, len(data), piece) for body in splitter.split(data[at : at + piece])]
    assert [decode_down(body) for body in bodies] == messages


def test_an_impossible_length_is_refused() -> None:
    with pytest.raises(FrameError):
        FrameSplitter().split(b"\xff\xff\xff\xff")


def test_a_number_too_large_for_the_wire_is_refused() -> None:
    with pytest.raises(OverflowError):
        encode_frame(generate("a", seed=2**64))


@pytest.mark.parametrize(
    "fields",
    [{"prompt": [1, "two"]}, {"prompt": [1.5]}, {"num_choices": "3"}, {"sampling": {"max_tokens": True}}, {"sampling": None}],
)
def test_a_message_with_wrong_types_still_names_its_request(fields: dict[str, object]) -> None:
    good = msgspec.to_builtins(generate("req-1", [1], n=2))
    message = decode_down(msgspec.msgpack.encode(good | fields))
    assert isinstance(message, Unreadable)
    assert message.request_id == "req-1"
    assert message.num_choices == (1 if "num_choices" in fields else 2)


def test_noise_is_unreadable_and_names_nobody() -> None:
    message = decode_down(b"\xc1\xc1")
    assert isinstance(message, Unreadable)
    assert (message.request_id, message.num_choices) == ("", 1)


def test_receive_takes_all_that_is_there(ends: tuple[Mailbox, socket.socket, threading.Event]) -> None:
    mailbox, theirs, _ = ends
    assert mailbox.receive(0) == []
    theirs.sendall(encode_frame(Abort("a")) + encode_frame(Abort("b")))
    got = mailbox.receive(None)
    while len(got) < 2:
        got += mailbox.receive(5)
    assert got == [Abort("a"), Abort("b")]
    assert mailbox.receive(0.01) == []


def test_being_woken_ends_a_wait_and_holds_nothing_back(ends: tuple[Mailbox, socket.socket, threading.Event]) -> None:
    mailbox, theirs, _ = ends
    threading.Timer(0.02, mailbox.wake).start()
    started = time.monotonic()
    assert mailbox.receive(10) == []
    assert time.monotonic() - started < 5
    mailbox.wake()
    mailbox.wake()
    theirs.sendall(encode_frame(Abort("a")))
    time.sleep(0.05)
    assert mailbox.receive(0) == [Abort("a")]
    assert mailbox.receive(0) == []


def test_a_peer_that_does_not_read_neither_blocks_nor_fills_memory(
    ends: tuple[Mailbox, socket.socket, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 200_000)
    mailbox, theirs, _ = ends
    sent = 0
    while mailbox.wait_for_room(0.05):
        mailbox.send(Failed(f"{sent:06d}" + "x" * 50_000))
        sent += 1
        assert sent < 10_000, "the bound was never met"
    assert mailbox.unsent_bytes < 200_000 + 51_000
    assert not mailbox.flush(0.01)

    splitter, bodies = FrameSplitter(), []
    while len(bodies) < sent:
        bodies += splitter.split(theirs.recv(1 << 20))
    assert [int(msgspec.msgpack.decode(body)["message"][:6]) for body in bodies] == list(range(sent))
    assert mailbox.flush(5)
    assert mailbox.wait_for_room(0)


def test_the_end_of_the_peer_is_told_once(ends: tuple[Mailbox, socket.socket, threading.Event]) -> None:
    mailbox, theirs, lost = ends
    theirs.close()
    assert lost.wait(5)
    assert mailbox.is_closed
    assert mailbox.receive(0.01) == []
    mailbox.send(Failed("nobody hears this"))


def test_a_peer_that_talks_nonsense_is_lost(ends: tuple[Mailbox, socket.socket, threading.Event]) -> None:
    _, theirs, lost = ends
    theirs.sendall(b"\xff" * 8)
    assert lost.wait(5)


def test_closing_is_not_losing() -> None:
    ours, theirs = socket.socketpair()
    lost = threading.Event()
    mailbox = Mailbox(ours, on_lost=lost.set)
    mailbox.close()
    time.sleep(0.05)
    assert not lost.is_set()
    theirs.close()


def test_the_asyncio_end_hears_every_message_and_the_loss() -> None:
    event = Event("a", 0, [5], [TokenLogprob(-0.5, [(5, -0.5)])], "stop", 2, Usage(3, 0, 1, 0.1, 0.2, 0.3))
    messages: list[Up] = [Progress("weights", 0.5), Beat(0.0, 1.0), Delivery([event], []), Failed("no")]

    async def scenario() -> list[Up]:
        ours, theirs = socket.socketpair()
        heard: list[Up] = []
        lost = asyncio.Event()
        line = Line(on_message=heard.append, on_lost=lost.set)
        await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=ours)
        data = b"".join(map(encode_frame, messages))
        theirs.sendall(data[:7])
        await asyncio.sleep(0.01)
        theirs.sendall(data[7:])
        line.send(Abort("a"))
        while len(heard) < len(messages):
            await asyncio.sleep(0.01)
        assert theirs.recv(100) == encode_frame(Abort("a"))
        theirs.sendall(encode_frame(Abort("not for us")))
        await asyncio.wait_for(lost.wait(), 5)
        line.send(Abort("too late"))
        theirs.close()
        return heard

    assert asyncio.run(scenario()) == messages
