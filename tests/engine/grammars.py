"""A small vocabulary and a model without weights that draws any allowed id, for the tests of grammars. Every id is a real piece of text."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.engine import BLOCKED_WAIT_S, Engine, Lane
from service.engine.messages import Down, Event, ModelInfo, Unreadable, Vocabulary
from service.scheduling.plan import PENDING, Drawn, KVGroup, StepPlan
from service.scheduling.scheduler import Scheduler
from tests.engine.test_loop import ListMailbox
from tests.fakes import ScriptedDrawing

EOS, OTHER_EOS, TOOL = 0, 1, 2
_SPECIAL = [b"<|end|>", b"<|stop|>", b"<tool_call>"]
_TEXT = [bytes([code]) for code in range(32, 127)] + [b"\n", b"\t", b"  ", b"\n\n", b"\xc3", b"\xa9", b"\xff"]
_WORDS = [b'": ', b'":', b'", "', b'{"', b'"}', b"]}", b"}}", b'["', b"true", b"false", b"null", b"10", b"name", b"ab", b" {", b'\\"']
PIECES = [*_SPECIAL, *_TEXT, *_WORDS, b""]
# Wider than the vocabulary, as padded tables of models are.
WIDTH = len(PIECES) + 29
VOCABULARY = Vocabulary("tiny", PIECES, [EOS, OTHER_EOS, TOOL], [EOS, OTHER_EOS])


def text_of(ids: Sequence[int]) -> bytes:
    return b"".join(PIECES[token] for token in ids if token > TOOL)


class RandomRunner:
    """Logits are a function of seed and position alone: of the allowed ids, any may come. Remembers how many rows had masks."""

    def __init__(self) -> None:
        self.num_masks = 0
        self.unmasked = 0
        self.num_ahead = 0
        self.last: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> StepPlan:
        self.num_ahead += any(piece.tokens[-1] == PENDING for piece in plan.slices)
        return plan

    def draw(self, handle: StepPlan, masks: NDArray[np.int32] | None = None) -> ScriptedDrawing:
        drawing = ScriptedDrawing(self, handle, masks)
        drawing.try_to_draw()
        return drawing

    def read(self, handle: StepPlan) -> list[object]:
        return []

    def sample(self, handle: StepPlan, masks: NDArray[np.int32] | None = None) -> list[Drawn]:
        samples = handle.samples
        self.num_masks += 0 if masks is None else len(masks)
        self.unmasked += masks is None
        drawn = []
        for row, sample in enumerate(samples):
            bits = np.ones(WIDTH, bool)
            if masks is not None:
                assert masks.shape == (len(samples), (WIDTH + 31) // 32)
                bits = np.unpackbits(masks[row].view(np.uint8), bitorder="little")[:WIDTH].astype(bool)
            bits[list(sample.banned)] = False
            allowed = np.flatnonzero(bits)
            assert len(allowed), "a row without any allowed id reached the sampler"
            noise = hashlib.blake2b(f"{sample.params.seed} {sample.position}".encode(), digest_size=4).digest()
            drawn.append(Drawn(int(allowed[int.from_bytes(noise, "little") % len(allowed)])))
        return drawn


class WakingMailbox(ListMailbox):
    """As the real one: a wait ends when somebody wakes it."""

    def __init__(self, visits: Sequence[Sequence[Down | Unreadable]]) -> None:
        super().__init__(visits)
        self._woken = threading.Event()

    def receive(self, timeout_s: float | None) -> Sequence[Down | Unreadable]:
        # A longer wait is the engine's rest, which only costs the test's own clock.
        if timeout_s == BLOCKED_WAIT_S and not self.visits and self._woken.wait(timeout_s):
            self._woken.clear()
        return super().receive(timeout_s)

    def wake(self) -> None:
        self._woken.set()


def random_lane(*, num_blocks: int = 512, max_sequences: int = 32, is_ahead: bool = False) -> Lane:
    info = ModelInfo("tiny", 2048, WIDTH, "float32", 1, num_blocks * 16, num_blocks, 16)
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=16, groups=(KVGroup(),), max_batch_tokens=256, max_sequences=max_sequences, max_context=2048
    )
    runner = RandomRunner()
    return Lane(info, scheduler, runner, ahead=runner if is_ahead else None)


def serve(
    *visits: Sequence[Down | Unreadable], lane: Lane | None = None
) -> tuple[dict[tuple[str, int], list[int]], dict[tuple[str, int], Event]]:
    """Runs an engine until it is idle: the ids of each choice, and its end. The vocabulary is sent ahead."""
    lane = lane or random_lane()
    mailbox = WakingMailbox([[VOCABULARY], *visits])
    Engine([lane], mailbox, mailbox.clock).run()
    lane.scheduler.check()
    assert not lane.scheduler.has_work
    assert not lane.is_compiling
    tokens: dict[tuple[str, int], list[int]] = {}
    ends: dict[tuple[str, int], Event] = {}
    for event in mailbox.events:
        key = (event.request_id, event.choice)
        assert key not in ends, "an event after the end"
        tokens.setdefault(key, []).extend(event.tokens)
        if event.finish is not None:
            ends[key] = event
    return tokens, ends
