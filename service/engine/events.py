"""What goes up the mailbox: events made of the scheduler's outputs, and how many of them make one message.

Values in and out; nothing is sent here. Called by `engine` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from service.engine.checks import MAX_READ_LOGPROBS
from service.engine.messages import Event, Reading, TokenLogprob, Usage
from service.errors import EngineError
from service.scheduling.plan import PromptReading
from service.scheduling.sequence import Output

STEP_FAILED = "the engine failed while it computed this request"


def parcels(events: list[Event]) -> list[list[Event]]:
    """The same events in their order, split where what was read of prompts would make one message too long. Never empty."""
    parts: list[list[Event]] = [[]]
    num_logprobs = 0
    for event in events:
        if event.reading is not None and event.reading.logprobs:
            size = len(event.reading.logprobs) * (1 + len(event.reading.logprobs[0].top))
            if num_logprobs and num_logprobs + size > MAX_READ_LOGPROBS:
                parts.append([])
                num_logprobs = 0
            num_logprobs += size
        parts[-1].append(event)
    return parts


def to_reading(reading: PromptReading) -> Reading:
    """What was read of a prompt as it goes up."""
    return Reading([TokenLogprob(logprob, list(top)) for logprob, top in reading.logprobs], reading.vector)


def merged(outputs: Sequence[Output]) -> list[Event]:
    """The outputs of one step as they go up: one event for each choice."""
    events: dict[tuple[str, int], Event] = {}
    for output in outputs:
        key = (output.request_id, output.choice)
        event = to_event(output)
        events[key] = _joined(events[key], event) if key in events else event
    return list(events.values())


def _joined(first: Event, second: Event) -> Event:
    """Of one choice; only the second can be its end, and only the first tell of its prompt."""
    logprobs = None if first.logprobs is None and second.logprobs is None else [*(first.logprobs or ()), *(second.logprobs or ())]
    return msgspec.structs.replace(
        second, tokens=[*first.tokens, *second.tokens], logprobs=logprobs, reading=first.reading or second.reading
    )


def to_event(output: Output) -> Event:
    """One choice's output as it goes up."""
    logprobs = None
    drawn = output.drawn
    if output.token is not None and drawn is not None and drawn.logprob is not None:
        logprobs = [TokenLogprob(drawn.logprob, list(drawn.top))]
    usage = output.usage
    picture = output.picture
    codes = list(picture.codes) if picture is not None else []
    return Event(
        output.request_id,
        output.choice,
        codes if output.token is None else [output.token],
        logprobs,
        output.finish,
        output.stop_id,
        None
        if usage is None
        else Usage(
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.queue_s,
            usage.prefill_s,
            usage.decode_s,
            usage.preemptions,
        ),
        None if output.finish != "error" else STEP_FAILED if output.error is None else output.error.message,
        EngineError.status if output.error is None else output.error.status,
        reading=None if output.reading is None else to_reading(output.reading),
        pixels=picture.pixels or None if picture is not None else None,
    )
