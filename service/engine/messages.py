"""What the HTTP process and the engine process say to each other. Frozen, typed, msgpack; nothing else crosses.

msgspec checks every field's type when it decodes; stdlib dataclasses (`SamplingParams`) travel as they are.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from service.scheduling.picture_grammar import PictureRule
from service.scheduling.reading import Pool, Read
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

FinishReason = Literal["stop", "length", "abort", "error", "deadline"]
MAX_CHOICES = 128
MAX_GUIDANCE = 20.0
MAX_DRAFT_LEN = 64


class ModelSource(msgspec.Struct, frozen=True):
    """One model to load: its public name, and the file (GGUF) or folder (safetensors) that holds it."""

    name: str
    path: str


class Load(msgspec.Struct, frozen=True, tag=True):
    """The first message down. memory_bytes: for weights and K/V of all models; 0 lets the engine decide. dtype, kv_dtype and device as
    the flags say. max_context 0: the model's own. draft: a small model with the same tokens, which guesses ids for the first model.
    max_prefill_s: that prompts may add to a step beside decoding sequences; 0: no bound. prepared_folder: where at most
    max_prepared_bytes of weights are kept as later starts want them; 0: none are, and none are looked for. tensor_parallel:
    processes that share each model's matrices. async_scheduling: are steps begun one ahead? deterministic: no row of a step may depend
    on the others. kernel_folder: where compiled GPU kernels are kept; "" leaves it to Triton."""

    models: tuple[ModelSource, ...]
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4", "fp8"]
    device: str
    memory_bytes: int
    max_context: int
    max_batch_tokens: int
    max_sequences: int
    prefix_cache: bool
    threads: int = 0
    log_level: str = "info"
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    draft: ModelSource | None = None
    max_prefill_s: float = 0.0
    prepared_folder: str = ""
    max_prepared_bytes: int = 0
    tensor_parallel: int = 1
    async_scheduling: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    kernel_folder: str = ""


class Generate(msgspec.Struct, frozen=True, tag=True):
    """num_choices sequences over one prompt; choice i draws with seed + i. tenant salts the prefix-cache keys. priority: smaller
    runs earlier, 0 is usual. timeout_s counts from arrival in the engine; 0 is none. grammar: text in llguidance's form that every
    choice has to follow, "" for none; its model's `Vocabulary` went ahead; grammar_param: the field that it came from, for errors.
    read: what to tell about the prompt, by choice 0 alone; with it sampling.max_tokens may be 0. pictures: which pictures the answer is
    or may hold, of a model that has them; None for words alone. unconditional: the prompt that guidance compares with, [] for none.
    draft_len: ids that may be guessed ahead, to save steps; the answer is the same."""

    request_id: str
    model: str
    prompt: list[int]
    sampling: SamplingParams
    num_choices: int = 1
    priority: int = 0
    timeout_s: float = 0.0
    tenant: str = ""
    grammar: str = ""
    read: Read | None = None
    grammar_param: str | None = None
    pictures: PictureRule | None = None
    unconditional: list[int] = []
    guidance: float = 1.0
    draft_len: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Of both prompts."""
        return len(self.prompt) + len(self.unconditional)


class Picture(msgspec.Struct, frozen=True, tag=True):
    """Pixels to be turned into codes, or codes into pixels: exactly one of the two is given. pixels: RGB, row by row, of the model's
    picture size. codes: ids. Its only event has the codes as tokens, or the pixels."""

    request_id: str
    model: str
    pixels: bytes = b""
    codes: list[int] = []
    priority: int = 0
    timeout_s: float = 0.0

    num_choices: ClassVar[int] = 1
    num_prompt_tokens: ClassVar[int] = 0
    grammar_param: ClassVar[str | None] = None


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """A model's tokens as grammars see them; sent once, before the first request that has one. pieces: each id's bytes. A special
    token's are its text, and its id is in special_ids. eos_ids end a text, the first is the usual one."""

    model: str
    pieces: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """All choices of a request, or one of them; unknown or finished ones are no error. `finished` says that the text met a stop
    string, so that the choice is counted as a stop and not as an abort."""

    request_id: str
    choice: int | None = None
    finished: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing, deliver nothing more, exit 0."""


Down = Load | Vocabulary | Generate | Picture | Abort | Shutdown


class Unreadable(msgspec.Struct, frozen=True):
    """What the engine's end makes of a message whose fields have wrong types; it never travels. request_id: "" when unknown."""

    request_id: str
    num_choices: int
    reason: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up, for people and machines: phase ("starting", "weights", "kv_cache", "warm_up", "graphs") and the share done, 0 ... 1."""

    phase: str
    fraction: float


class ModelInfo(msgspec.Struct, frozen=True):
    """What a loaded model can do. weight_bytes: that a decode step reads. kv_tokens: how many tokens its K/V pool
    holds. num_kv_blocks counts blocks of block_size. can_generate: an encoder can't. pool: how its hidden states become a vector
    unless a request says otherwise, and vector_width numbers of it. pictures: which ids are codes, where it has any; picture_pixels: of a
    code's side, 0 where the model came without what turns pixels into codes. usual_draft_len: ids guessed ahead unless a request says
    otherwise."""

    name: str
    max_context: int
    vocab_size: int
    dtype: str
    weight_bytes: int
    kv_tokens: int
    num_kv_blocks: int
    block_size: int
    can_generate: bool = True
    pool: Pool = "last"
    vector_width: int = 0
    pictures: PictureIds | None = None
    picture_pixels: int = 0
    usual_draft_len: int = 0

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels; (0, 0) without pictures."""
        return (self.pictures.rows * self.picture_pixels, self.pictures.columns * self.picture_pixels) if self.pictures else (0, 0)


class Ready(msgspec.Struct, frozen=True, tag=True):
    models: tuple[ModelInfo, ...]


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """logprob of the drawn id, and (id, logprob) of the likeliest."""

    logprob: float
    top: list[tuple[int, float]]


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Of one finished choice. Times in seconds: waiting before the first slice, first slice to first id, first id to last."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    preemptions: int = 0


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """What a `Read` asked for. logprobs: one per prompt id from Read.first on. vector: float32, little-endian, not normalised."""

    logprobs: list[TokenLogprob]
    vector: bytes | None = None


class Event(msgspec.Struct, frozen=True, array_like=True):
    """New ids of one choice (maybe none), and its end when finish is set. stop_id: the id that ended it, not among `tokens`.
    Exactly one event of each choice has finish and usage set, and it is the last. error: text for finish "error", and
    error_status: the HTTP status that fits it (`errors.py`), error_param and error_code: the field and the code of the body.
    reading: with choice 0's first event after the prompt, where it was asked for. pixels: of a picture that was drawn."""

    request_id: str
    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop_id: int | None = None
    usage: Usage | None = None
    error: str | None = None
    error_status: int = 500
    error_param: str | None = None
    error_code: str | None = None
    reading: Reading | None = None
    pixels: bytes | None = None


class LaneStats(msgspec.Struct, frozen=True):
    """One model's state after a step, and its totals since start. drafts: by kind, ids guessed ahead and those of them that were right.
    graph_replays, graph_misses, kernel_compiles: as in `RunnerCounts`."""

    model: str
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    drafts: dict[str, tuple[int, int]] = {}
    graph_replays: int = 0
    graph_misses: int = 0
    kernel_compiles: int = 0


class Delivery(msgspec.Struct, frozen=True, tag=True):
    """Everything one step of one model produced, in one message. step_tokens: tokens computed in it (0: none ran), step_model: by."""

    events: list[Event]
    stats: list[LaneStats]
    step_tokens: int = 0
    step_s: float = 0.0
    step_model: str = ""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Sent twice a second by a thread of its own: the engine lives. step_age_s: how long the step in hand has run (0: idle),
    step_estimate_s: how long it was expected to."""

    step_age_s: float
    step_estimate_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine can't go on (or could not start) and exits. message is fit for people, without paths of the program."""

    message: str


Up = Progress | Ready | Delivery | Beat | Failed
