"""Whether the engine's step in hand is overdue, judged from what was heard and for how long nothing was.

Plain numbers, no clock: time passes by `wait`. Used by the engine client, which calls it once per tick of its own loop, so that time
in which that loop itself stood still is not held against the engine.
"""

from __future__ import annotations

from service.engine.messages import Beat

STALL_S = 2.0
STALL_FACTOR = 5.0
IDLE = Beat(step_age_s=0.0, step_estimate_s=0.0)


class Vitals:
    """stalled_s: for how long the stall in progress has been seen; 0 without one."""

    def __init__(self) -> None:
        self.stalled_s = 0.0
        self.num_stalls = 0
        self._beat = IDLE
        self._silence_s = 0.0

    def hear(self, beat: Beat | None = None) -> None:
        """Anything from the engine is a sign of life; a beat also tells of the step in hand."""
        self._silence_s = 0.0
        if beat is not None:
            self._beat = beat

    def wait(self, seconds: float) -> None:
        """So much time has passed in which the engine could have been heard."""
        self._silence_s += seconds
        if not self.is_stalled:
            self.stalled_s = 0.0
            return
        self.num_stalls += not self.stalled_s
        self.stalled_s += seconds

    @property
    def step_age_s(self) -> float:
        """Of the step in hand, or of the silence."""
        return self._beat.step_age_s + self._silence_s

    @property
    def is_stalled(self) -> bool:
        """Is a step longer in hand than max(2 s, 5 x its estimate), or has the process not even beaten for 2 s?"""
        limit_s = max(STALL_S, STALL_FACTOR * self._beat.step_estimate_s)
        return self._silence_s > STALL_S or (self._beat.step_age_s > 0 and self.step_age_s > limit_s)
