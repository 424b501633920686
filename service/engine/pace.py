"""How long a step should take, how long the one in hand has taken, and the thread that says so twice a second.

Nothing here decides anything: the client judges from the beats whether the engine is stalled. Used by the engine loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.engine.mailbox import Mailbox
from service.engine.messages import Beat

BEAT_S = 0.5
# Of the first step of all. Warm-up has run before it, so this leaves room for a long prompt and not for a compiler.
UNKNOWN_STEP_S = 4.0
_NEWEST_WEIGHT = 0.2


class StepEstimate:
    """Seconds that a step of n tokens takes: a running mean per power of two of n, so that small steps and long ones don't
    blur; a size never seen is scaled from the nearest one seen."""

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}

    def of(self, num_tokens: int) -> float:
        if not self._mean_s:
            return UNKNOWN_STEP_S
        size = num_tokens.bit_length()
        nearest = min(self._mean_s, key=lambda known: abs(known - size))
        return self._mean_s[nearest] * float(2 ** max(size - nearest, 0))

    def learn(self, num_tokens: int, seconds: float) -> None:
        size = num_tokens.bit_length()
        mean_s = self._mean_s.get(size, seconds)
        self._mean_s[size] = mean_s + _NEWEST_WEIGHT * (seconds - mean_s)


class Pulse:
    """The step in hand, written by the loop and read by the beat thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._step: tuple[float, float] | None = None

    def begin(self, now: float, estimate_s: float) -> None:
        self._step = (now, estimate_s)

    def end(self) -> None:
        self._step = None

    def beat(self) -> Beat:
        step = self._step
        if step is None:
            return Beat(step_age_s=0.0, step_estimate_s=0.0)
        started, estimate_s = step
        return Beat(step_age_s=max(self._clock() - started, 0.0), step_estimate_s=estimate_s)


class BeatThread:
    """Sends a beat twice a second until stopped. Leaves one out while earlier messages are unsent: a peer that does not read
    must not make us hoard them."""

    def __init__(self, mailbox: Mailbox, pulse: Pulse) -> None:
        self._mailbox = mailbox
        self._pulse = pulse
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopping.wait(BEAT_S):
            if not self._mailbox.unsent_bytes:
                self._mailbox.send(self._pulse.beat())
