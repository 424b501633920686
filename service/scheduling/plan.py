"""The one value that crosses from the scheduler to the runner: which tokens of which sequences a step computes. Ints and tuples only.

There is no prefill and no decode here: a slice is "this sequence, from here, these tokens". The scheduler makes plans, the runner
reads them, `commit` takes the sampled ids back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from service.scheduling.reading import Pool
from service.scheduling.sampling import SamplingParams

PENDING = -1
"""Stands for an id that is drawn and that the host does not know yet: the one that the runner drew last for that sequence."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one attention window and so one block table. window None sees everything; sink: first positions kept."""

    window: int | None = None
    sink: int = 0


@dataclass(frozen=True, slots=True)
class PictureWork:
    """A picture to be turned into codes, or codes into a picture: exactly one of the two is given. pixels: RGB, a byte a colour, row by
    row, of the size that the model's pictures have. codes: ids, row by row."""

    request_id: str
    pixels: bytes = b""
    codes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PictureResult:
    """What became of one `PictureWork`: codes of pixels, pixels of codes, or neither when it failed."""

    request_id: str
    pixels: bytes = b""
    codes: tuple[int, ...] = ()

    @property
    def is_failed(self) -> bool:
        return not (self.pixels or self.codes)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of tokens of one sequence computed in one step.

    start: position of tokens[0]. tokens: the last one may be `PENDING`. tables: per K/V group, the ids of the blocks that hold positions
    0 ... start + len(tokens) - 1 (block i holds positions i * block_size onward), and maybe some that wrong guesses left; an entry behind a
    group's window may be -1.
    grid_starts: per token, where the picture that it is a code of begins (the position of its first code), -1 for other tokens; empty
    when none of them is a code.
    is_first_known: the K/V of tokens[0] is in its place already, in a block that others may share: it must not be written.
    """

    sequence_id: int
    start: int
    tokens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    grid_starts: tuple[int, ...] = ()
    is_first_known: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One id to draw after this step, from the last token of one slice, or of two (classifier-free guidance: first the
    conditional slice, then the unconditional one; logits = uncond + guidance * (cond - uncond)).

    back: how many tokens before the last one of its slices it is drawn from; those behind it are drafts of this id and its followers.

    position: of the id to be drawn; with params.seed it keys the noise. num_generated: ids drawn for this gang so far.
    history: prompt and output ids so far, given only when params.has_penalties; the last one may be `PENDING`. prompt_len: how many of
    them are the prompt.
    banned: ids that must not be drawn now (stop ids before min_tokens).
    """

    sequence_id: int  # of the conditional sequence: names the gang
    slice_indexes: tuple[int, ...]
    params: SamplingParams
    position: int
    num_generated: int
    history: tuple[int, ...] | None = None
    prompt_len: int = 0
    banned: tuple[int, ...] = ()
    guidance: float = 1.0
    back: int = 0


@dataclass(frozen=True, slots=True)
class PromptRead:
    """What to read of one slice, which holds prompt tokens alone. sequence_id keys what is kept between the slices of a prompt (the
    running sum of a mean). targets: prompt ids whose logprobs are wanted; targets[k] follows row first_row + k of the slice.
    num_top: alternatives beside each. pool: as in `Read`. is_last: does the slice end the prompt? The vector comes then."""

    slice_index: int
    sequence_id: int
    first_row: int = 0
    targets: tuple[int, ...] = ()
    num_top: int = 0
    pool: Pool = ""
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the runner does in one step. slices with one token come first. released: sequences whose state it may forget.
    reads: at most one per slice. encode, draw: pictures whose codes, and codes whose pictures are begun with this step; nothing in a plan
    waits for them."""

    step_id: int
    slices: tuple[Slice, ...]
    samples: tuple[Sample, ...]
    released: tuple[int, ...] = ()
    encode: tuple[PictureWork, ...] = ()
    draw: tuple[PictureWork, ...] = ()
    reads: tuple[PromptRead, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What came of one `Sample`, in the plan's order. logprob and top (id, logprob; likeliest first) only where asked."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class RunnerCounts(NamedTuple):
    """Of a runner since it was ready. graph_replays: steps that ran as a recorded graph; graph_misses: those of one token a sequence that
    had to do without; kernel_compiles: kernels that warm-up had not compiled or fetched from disk, and a step had to."""

    graph_replays: int = 0
    graph_misses: int = 0
    kernel_compiles: int = 0


TokenReading = tuple[float, tuple[tuple[int, float], ...]]
"""The logprob of a prompt id, and (id, logprob) of the likeliest ones at its place, likeliest first."""


@dataclass(frozen=True, slots=True)
class PromptReading:
    """What came of one `PromptRead`, in the plan's order. logprobs: one per target.
    vector: float32, little-endian, not normalised; with the prompt's last slice and only where a pool was asked for."""

    logprobs: tuple[TokenReading, ...] = ()
    vector: bytes | None = None
