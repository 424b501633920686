"""Stand-ins that need no model and no torch: a runner that draws by a formula, and the loader that gives it to a real worker.

Used by the tests of the engine, in this process and (through `tests/fake_worker.py`) in a real engine process.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from service.engine.messages import Generate, Load, ModelInfo
from service.scheduling.plan import PENDING, Drawn, KVGroup, PromptRead, PromptReading, RunnerCounts, Sample, Slice, StepPlan
from service.scheduling.sampling import SamplingParams

VOCAB = 1000
# Prompt ids that make the runner misbehave in the step that computes them.
FAIL_FORWARD = 901
FAIL_SAMPLE = 902
OUT_OF_MEMORY = 903
DRAW_TOO_FEW = 904
DRAW_OUTSIDE = 905
HANG = 906
FAIL_READ = 907
READ_TOO_FEW = 908
# Drawn ids lie below, so that what is generated never triggers anything.
DRAWN_IDS = 900


def scripted_token(last: int, position: int, seed: int, banned: tuple[int, ...] = ()) -> int:
    """The id drawn at `position` after the id `last`."""
    token = (last * 31 + position * 17 + seed * 101 + 7) % DRAWN_IDS
    while token in banned:
        token = (token + 1) % DRAWN_IDS
    return token


def scripted_tokens(prompt: Iterable[int], count: int, seed: int = 0) -> list[int]:
    """What a request alone must get."""
    ids = list(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(scripted_token(ids[-1], len(ids), seed))
    return ids[start:]


def scripted_logprob(last: int, target: int) -> float:
    """Of the prompt id `target` after the id `last`."""
    return -(last * 7 + target) / 1000


def scripted_vector(last: int) -> bytes:
    """Of a prompt that ends with the id `last`."""
    return struct.pack("<2f", last, 1)


class ScriptedRunner:
    """Draws by `scripted_token`, sleeps step_s per step, and fails where a prompt says so. Remembers the sizes of its steps, and how many
    were begun before their ids were known. last: the id that was drawn last for each sequence."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.steps: list[int] = []
        self.num_ahead = 0
        self.last: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> StepPlan:
        self.steps.append(plan.num_tokens)
        self.num_ahead += any(piece.tokens[-1] == PENDING for piece in plan.slices)
        plan = replace(plan, slices=tuple(map(self._resolve, plan.slices)))
        time.sleep(self.step_s)
        ids = {token for piece in plan.slices for token in piece.tokens}
        if FAIL_FORWARD in ids:
            raise RuntimeError("forward was told to fail")
        if OUT_OF_MEMORY in ids:
            raise MemoryError("forward was told to run out of memory")
        if HANG in ids:
            time.sleep(600)
        return plan

    def sample(self, handle: StepPlan, masks: None = None) -> list[Drawn]:
        ids = {token for piece in handle.slices for token in piece.tokens}
        if FAIL_SAMPLE in ids:
            raise RuntimeError("sample was told to fail")
        if DRAW_TOO_FEW in ids:
            return []
        drawn = [self._draw(handle, sample) for sample in handle.samples]
        return [Drawn(VOCAB) for _ in drawn] if DRAW_OUTSIDE in ids else drawn

    def draw(self, handle: StepPlan, masks: None = None) -> ScriptedDrawing:
        drawing = ScriptedDrawing(self, handle, masks)
        if handle.samples:
            drawing.try_to_draw()
        return drawing

    def _resolve(self, piece: Slice) -> Slice:
        return replace(piece, tokens=(*piece.tokens[:-1], self.last[piece.sequence_id])) if piece.tokens[-1] == PENDING else piece

    def read(self, handle: StepPlan) -> list[PromptReading]:
        ids = {token for piece in handle.slices for token in piece.tokens}
        if FAIL_READ in ids:
            raise RuntimeError("read was told to fail")
        return [] if READ_TOO_FEW in ids else [self._read(handle, read) for read in handle.reads]

    def _read(self, plan: StepPlan, read: PromptRead) -> PromptReading:
        tokens = plan.slices[read.slice_index].tokens
        pairs = zip(tokens[read.first_row :], read.targets, strict=False)
        logprobs = [(scripted_logprob(last, target), tuple((i, -0.5 - i) for i in range(read.num_top))) for last, target in pairs]
        return PromptReading(tuple(logprobs), scripted_vector(tokens[-1]) if read.pool and read.is_last else None)

    def _draw(self, plan: StepPlan, sample: Sample) -> Drawn:
        last = plan.slices[sample.slice_indexes[0]].tokens[-1 - sample.back]
        token = scripted_token(last, sample.position, sample.params.seed, sample.banned)
        if sample.params.logprobs is None:
            return Drawn(token)
        return Drawn(token, -0.5, tuple((token + i, -0.5 - i) for i in range(sample.params.logprobs)))


class ScriptedDrawing:
    """As of a device that works in order: ids, and failures, are there when they are waited for."""

    def __init__(self, runner: Any, handle: StepPlan, masks: Any) -> None:
        self._runner, self._handle, self._masks = runner, handle, masks
        self._drawn: list[Drawn] = []
        self._error: Exception | None = None

    def try_to_draw(self) -> None:
        try:
            self._drawn = self._runner.sample(self._handle, self._masks)
        except RuntimeError as error:
            self._error = error
        for sample, one in zip(self._handle.samples, self._drawn, strict=False):
            self._runner.last.update((self._handle.slices[index].sequence_id, one.token) for index in sample.slice_indexes)

    def wait(self) -> list[Drawn]:
        if self._error is not None:
            raise self._error
        return self._drawn


@dataclass(frozen=True)
class ScriptedModel:
    """What a loader returns for one model."""

    info: ModelInfo
    runner: ScriptedRunner
    groups: tuple[KVGroup, ...] = (KVGroup(),)
    painter: None = None
    draft: None = None
    ahead: None = None
    counts: type[RunnerCounts] = RunnerCounts


def scripted_model(name: str = "tiny", *, num_blocks: int = 64, step_s: float = 0.0, max_context: int = 512) -> ScriptedModel:
    info = ModelInfo(
        name=name,
        max_context=max_context,
        vocab_size=VOCAB,
        dtype="float32",
        weight_bytes=1,
        kv_tokens=num_blocks * 16,
        num_kv_blocks=num_blocks,
        block_size=16,
    )
    return ScriptedModel(info, ScriptedRunner(step_s))


def scripted_loader(*, step_s: float = 0.0, num_blocks: int = 64) -> Callable[[Load, Callable[[str, float], None]], list[ScriptedModel]]:
    def load_models(load: Load, progress: Callable[[str, float], None]) -> list[ScriptedModel]:
        progress("weights", 0.5)
        max_context = load.max_context or 512
        return [scripted_model(source.name, num_blocks=num_blocks, step_s=step_s, max_context=max_context) for source in load.models]

    return load_models


def generate(
    request_id: str, prompt: Iterable[int] = (1, 2, 3), *, max_tokens: int = 8, model: str = "tiny", n: int = 1, **others: object
) -> Generate:
    """A request; `others` go to the sampling parameters where these have such a field, else to the request."""
    names = SamplingParams.__dataclass_fields__
    sampling = SamplingParams(max_tokens=max_tokens, **{key: value for key, value in others.items() if key in names})
    rest = {key: value for key, value in others.items() if key not in names}
    return Generate(request_id=request_id, model=model, prompt=list(prompt), sampling=sampling, num_choices=n, **rest)
