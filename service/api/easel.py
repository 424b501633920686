"""Where pictures are read and drawn: pixels into codes, codes into pixels, and orders for pictures into running sequences and previews.

Knows no HTTP and no JSON, and no file formats: pixels go in and out. Shared by the picture, video and chat routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from service.api.auth import salted
from service.api.backend import Backend, Caller, context_of
from service.codec.pixels import Pixels
from service.engine.messages import Event, Generate, ModelInfo, Picture, Usage
from service.engine.stream import Stream, error_of
from service.errors import ContextLengthError, RequestError, UnavailableError
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds

MAX_KNOWN = 4096
"""Pictures whose codes are remembered: a conversation brings the same ones with each of its turns. 64 ints each."""

Codes = tuple[int, ...]


class Wishes(Protocol):
    """What every request may say of its own haste, and of whose prefixes it may find."""

    @property
    def priority(self) -> int: ...

    @property
    def timeout(self) -> float | None: ...

    @property
    def cache_salt(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Errand:
    """For whom work is done, and how much it can wait. tenant: whose prefixes it may find. arrival, deadline: in time.monotonic's seconds,
    of the request, and None for none. priority: smaller first."""

    tenant: str
    arrival: float
    priority: int = 0
    deadline: float | None = None

    @staticmethod
    def of(caller: Caller, wanted: Wishes) -> Errand:
        deadline = caller.arrival + wanted.timeout if wanted.timeout else None
        return Errand(salted(caller.tenant, wanted.cache_salt), caller.arrival, caller.rank(wanted.priority), deadline)

    @property
    def left_s(self) -> float:
        """Until the deadline, for the engine: 0 where there is none."""
        return 0.0 if self.deadline is None else max(self.deadline - time.monotonic(), 0.001)


@dataclass(frozen=True, slots=True)
class Order:
    """Pictures that are wanted, ready for the engine. prompt: ends with the picture's beginning and what of it is given. rule: how many
    pictures a choice has, what is kept of the first. num_choices: drawings; choice i draws with seed + i. preview_rows: after how many rows
    of the first picture it is shown."""

    model: str
    prompt: tuple[int, ...]
    unconditional: tuple[int, ...]
    rule: PictureRule
    sampling: SamplingParams
    errand: Errand
    num_choices: int = 1
    guidance: float = 1.0
    draft_len: int = 0
    preview_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture that is being drawn: below the rows of codes that it has so far its pixels are white."""

    choice: int
    index: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Frame:
    """One more picture of a choice has all its codes."""

    choice: int
    index: int
    codes: Codes


@dataclass(frozen=True, slots=True)
class Painting:
    """A choice's pictures, whole."""

    choice: int
    frames: tuple[Codes, ...]
    usage: Usage | None


class Easel:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._known: OrderedDict[bytes, Codes] = OrderedDict()

    def choose(self, name: str | None) -> str:
        """The model, or without a name the first that draws. Raises: ModelNotFoundError, RequestError, UnavailableError."""
        return self.backend.choose(name, draws=True)

    def marks(self, model: str) -> PictureIds:
        """Which ids are codes. Raises: RequestError for a model without pictures, UnavailableError."""
        return marks_of(self.backend.known(model))

    # -- pixels and codes --

    async def encode(self, model: str, pixels: Pixels, errand: Errand) -> Codes:
        """The codes of a picture of the model's size. Raises: OverloadedError, DeadlineError, UnavailableError, EngineError."""
        key = _key(model, errand.tenant, pixels)
        known = self._known.get(key)
        if known is None:
            event = await self._work(Picture(_new_id(), model, pixels=pixels.data, priority=errand.priority, timeout_s=errand.left_s))
            known = tuple(event.tokens)
        self._remember(key, known)
        return known

    def _remember(self, key: bytes, codes: Codes) -> None:
        """Mutates: what is known, which may forget the longest unused."""
        self._known[key] = codes
        self._known.move_to_end(key)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    async def draw(self, model: str, codes: Sequence[int], errand: Errand, *, rows: int | None = None) -> Pixels:
        """The picture of codes; of its first rows alone, white below them. Raises: OverloadedError, DeadlineError, UnavailableError,
        EngineError."""
        info = self.backend.known(model)
        marks, (height, width) = marks_of(info), info.picture_size
        rows = marks.rows if rows is None else rows
        given = list(codes[: rows * marks.columns])
        # What is not there yet repeats the last row, so that the decoder sees nothing strange below the rows that are shown.
        given += (given[-marks.columns :] * marks.rows)[: marks.num_places - len(given)]
        event = await self._work(Picture(_new_id(), model, codes=given, priority=errand.priority, timeout_s=errand.left_s))
        data = event.pixels or b""
        shown = rows * info.picture_pixels * width * 3
        pixels = Pixels(height, width, data[:shown] + b"\xff" * (len(data) - shown))
        if rows == marks.rows:
            # A client that brings it back means these codes, which an encoder would not always find again.
            self._remember(_key(model, errand.tenant, pixels), tuple(given))
        return pixels

    async def _work(self, wanted: Picture) -> Event:
        stream = self.backend.start_picture(wanted)
        async with aclosing(stream.batches()) as batches:
            async for events in batches:
                event = events[-1]
                if (error := error_of(event)) is not None:
                    raise error
                if event.finish == "stop":
                    return event
        raise UnavailableError("The request was aborted.")

    # -- drawing --

    async def paint(self, order: Order, *, is_part: bool = False) -> AsyncGenerator[Preview | Frame | Painting, None]:
        """Previews and frames as they come, and at last each choice's painting. is_part: of work that was let in. Raises: OverloadedError,
        UnavailableError, and what the engine made of it.

        Leaving it early ends what is drawn.
        """
        news: asyncio.Queue[Preview | Frame | Painting | BaseException | None] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()
        stream = self._submit(order, is_part)

        def start(work: Coroutine[Any, Any, None]) -> None:
            task = asyncio.create_task(work)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        async def preview(choice: int, index: int, rows: int, codes: Codes) -> None:
            try:
                news.put_nowait(Preview(choice, index, await self.draw(order.model, codes, order.errand, rows=rows)))
                if index == 0:
                    self.backend.count_picture(order.model, order.errand.arrival, is_preview=True)
            except Exception as error:  # told by whoever reads
                news.put_nowait(error)

        async def follow() -> None:
            try:
                sketches = [_Sketch(self.marks(order.model), order) for _ in range(order.num_choices)]
                async with aclosing(stream.batches()) as batches:
                    async for events in batches:
                        for event in events:
                            for index, rows, codes in sketches[event.choice].take(event):
                                start(preview(event.choice, index, rows, codes))
                            for item in sketches[event.choice].news(event):
                                # Behind the choice's previews, which are still being drawn.
                                waits = [task for task in tasks if task is not asyncio.current_task()] if isinstance(item, Painting) else []
                                start(tell(item, waits))
                while len(tasks) > 1:  # itself aside
                    await asyncio.wait([task for task in tasks if task is not asyncio.current_task()])
                news.put_nowait(None)
            except Exception as error:
                news.put_nowait(error)

        async def tell(item: Frame | Painting, waits: Sequence[asyncio.Task[None]]) -> None:
            if waits:
                await asyncio.wait(waits)
            news.put_nowait(item)

        start(follow())
        try:
            while (item := await news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stream.leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def check_room(self, order: Order) -> None:
        """Raises: ContextLengthError where prompt and pictures do not fit together; UnavailableError."""
        context = context_of(self.backend.info(order.model))
        longest = max(len(order.prompt), len(order.unconditional)) + order.sampling.max_tokens
        if longest > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, prompt and pictures have {longest} together: "
                "the prompt is too long, or there are too many pictures in a row. Please reduce them.",
                param="prompt",
            )

    async def paintings(self, order: Order, *, is_part: bool = False) -> list[Painting]:
        """Of all choices, in their order, without previews."""
        async with aclosing(self.paint(replace(order, preview_rows=()), is_part=is_part)) as items:
            found = [item async for item in items if isinstance(item, Painting)]
        return sorted(found, key=lambda painting: painting.choice)

    def _submit(self, order: Order, is_part: bool) -> Stream[Generate]:
        wanted = Generate(
            request_id=_new_id(),
            model=order.model,
            prompt=list(order.prompt),
            sampling=order.sampling,
            num_choices=order.num_choices,
            priority=order.errand.priority,
            timeout_s=order.errand.left_s,
            tenant=order.errand.tenant,
            pictures=order.rule,
            unconditional=list(order.unconditional) if order.guidance != 1.0 else [],
            guidance=order.guidance,
            draft_len=order.draft_len,
        )
        return self.backend.start_counted(wanted, order.errand.arrival, is_part=is_part)


class _Sketch:
    """One choice's codes as they come."""

    def __init__(self, marks: PictureIds, order: Order) -> None:
        self._marks = marks
        self._codes: list[int] = list(order.rule.kept[: order.rule.num_known])
        self._rows_left = [rows for rows in order.preview_rows if rows * marks.columns > len(self._codes)]
        self._num_previews = 0
        self._num_frames = 0
        self._num_wanted = order.rule.num_frames

    def take(self, event: Event) -> list[tuple[int, int, Codes]]:
        """The previews that it makes possible: number, rows, codes. Mutates: the sketch."""
        columns = self._marks.columns
        self._codes += [token for token in event.tokens if self._marks.is_code(token)]
        found = []
        # Of several that come at once the last says all; a finished picture needs none.
        due = [rows for rows in self._rows_left if rows * columns <= len(self._codes)]
        if due and len(self._codes) < self._marks.num_places:
            found = [(self._num_previews, due[-1], tuple(self._codes[: due[-1] * columns]))]
            self._num_previews += 1
        self._rows_left = self._rows_left[len(due) :]
        return found

    def news(self, event: Event) -> list[Frame | Painting]:
        """Raises: the error that the event stands for."""
        size, items = self._marks.num_places, list[Frame | Painting]()
        while (self._num_frames + 1) * size <= len(self._codes):
            first = self._num_frames * size
            items.append(Frame(event.choice, self._num_frames, tuple(self._codes[first : first + size])))
            self._num_frames += 1
        if event.finish is not None:
            if (error := error_of(event)) is not None:
                raise error
            if self._num_frames < self._num_wanted:
                raise UnavailableError("The request was aborted.")
            frames = tuple(tuple(self._codes[at : at + size]) for at in range(0, size * self._num_wanted, size))
            items.append(Painting(event.choice, frames, event.usage))
        return items


def marks_of(info: ModelInfo) -> PictureIds:
    """Raises: RequestError for a model without pictures."""
    if info.pictures is None or not info.picture_pixels:
        raise RequestError(f"the model {info.name} can't read or draw pictures", param="model", code="unsupported_model")
    return info.pictures


def _key(model: str, tenant: str, pixels: Pixels) -> bytes:
    """A tenant's pictures mean what it has drawn itself, whatever others did."""
    return hashlib.sha256(f"{model}\0{tenant}\0".encode() + pixels.data).digest()


def _new_id() -> str:
    return f"pic-{uuid.uuid4().hex}"
