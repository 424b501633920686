"""Estimates of step times, and the beats that carry them."""

from __future__ import annotations

import socket

import msgspec

from service.engine.mailbox import FrameSplitter, Mailbox
from service.engine.messages import Beat
from service.engine.pace import UNKNOWN_STEP_S, BeatThread, Pulse, StepEstimate


def test_small_and_large_steps_do_not_blur() -> None:
    estimate = StepEstimate()
    assert estimate.of(16) == UNKNOWN_STEP_S
    for _ in range(50):
        estimate.learn(1, 0.01)
        estimate.learn(1024, 1.0)
    assert abs(estimate.of(1) - 0.01) < 1e-6
    assert abs(estimate.of(1024) - 1.0) < 1e-6


def test_a_size_never_seen_is_scaled_up_but_not_down() -> None:
    estimate = StepEstimate()
    estimate.learn(16, 0.1)
    assert estimate.of(64) == 0.4
    assert estimate.of(1) == 0.1


def test_an_estimate_follows_a_change() -> None:
    estimate = StepEstimate()
    estimate.learn(8, 1.0)
    for _ in range(40):
        estimate.learn(8, 0.1)
    assert estimate.of(8) < 0.11


def test_a_beat_tells_the_step_in_hand() -> None:
    now = [10.0]
    pulse = Pulse(lambda: now[0])
    assert pulse.beat() == Beat(0.0, 0.0)
    pulse.begin(10.0, 0.25)
    now[0] = 13.5
    assert pulse.beat() == Beat(3.5, 0.25)
    pulse.end()
    assert pulse.beat() == Beat(0.0, 0.0)


def test_beats_arrive_while_nobody_steps() -> None:
    ours, theirs = socket.socketpair()
    mailbox = Mailbox(ours, on_lost=lambda: None)
    pulse = Pulse(lambda: 5.0)
    pulse.begin(2.0, 1.0)
    beats = BeatThread(mailbox, pulse)
    beats.start()
    theirs.settimeout(10)
    bodies = FrameSplitter().split(theirs.recv(1000))
    beats.stop()
    mailbox.close()
    theirs.close()
    assert msgspec.msgpack.decode(bodies[0], type=Beat) == Beat(3.0, 1.0)
