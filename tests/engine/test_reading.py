"""Prompts that are read, through the engine loop: what goes up, what is refused, and what a runner's fault costs."""

from __future__ import annotations

import msgspec
import pytest

from service.engine.checks import MAX_READ_LOGPROBS, check_request
from service.engine.events import parcels
from service.engine.mailbox import MAX_FRAME_BYTES, encode_frame
from service.engine.messages import Delivery, Event, Generate, Reading, TokenLogprob
from service.errors import RequestError
from service.scheduling.reading import Read
from tests.engine.test_loop import run
from tests.fakes import FAIL_READ, READ_TOO_FEW, VOCAB, generate, scripted_logprob, scripted_model, scripted_tokens, scripted_vector


def read_of(prompt: list[int], first: int, num_top: int = 0) -> list[TokenLogprob]:
    return [
        TokenLogprob(scripted_logprob(prompt[at - 1], prompt[at]), [(i, -0.5 - i) for i in range(num_top)])
        for at in range(first, len(prompt))
    ]


def test_a_prompt_is_read_and_nothing_is_drawn() -> None:
    prompt = list(range(100))
    events = run([generate("r", prompt, max_tokens=0, read=Read(first=1, num_top=2, pool="last"))]).events
    (event,) = events
    assert event.reading == Reading(read_of(prompt, 1, 2), scripted_vector(99))
    assert (event.tokens, event.finish, event.error) == ([], "length", None)
    assert event.usage is not None
    assert (event.usage.prompt_tokens, event.usage.completion_tokens) == (100, 0)


def test_the_reading_comes_with_the_first_token() -> None:
    events = run([generate("r", (5, 6, 7), max_tokens=3, n=2, read=Read(first=2))]).events
    of_first = [event for event in events if event.choice == 0]
    assert [event.reading is not None for event in of_first] == [True, False, False]
    assert of_first[0].reading == Reading(read_of([5, 6, 7], 2))
    assert all(event.reading is None for event in events if event.choice == 1)
    assert [token for event in of_first for token in event.tokens] == scripted_tokens((5, 6, 7), 3)


@pytest.mark.parametrize("bad", [FAIL_READ, READ_TOO_FEW])
def test_a_fault_of_reading_ends_the_step_and_no_more(bad: int) -> None:
    events = run(
        [generate("bad", (1, bad, 2), max_tokens=0, read=Read(first=1))],
        [generate("good", (1, 2, 3), max_tokens=2, read=Read(first=1))],
    ).events
    ends = {event.request_id: event.finish for event in events if event.finish}
    assert ends == {"bad": "error", "good": "length"}
    assert [event.reading for event in events if event.reading] == [Reading(read_of([1, 2, 3], 1))]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (generate("r", (1, 2), max_tokens=0), "max_tokens"),
        (generate("r", (1, 2), read=Read()), "nothing to read"),
        (generate("r", (1, 2), read=Read(first=3)), "position 3"),
        (generate("r", (1, 2), read=Read(first=1, num_top=21)), "alternatives"),
        (generate("r", (1, 2), max_tokens=-1, read=Read(first=1)), "max_tokens"),
        (generate("r", [1] * 100_000, read=Read(first=1, num_top=20)), "too many"),
    ],
)
def test_reads_that_can_not_be(wanted: Generate, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(wanted, scripted_model().info)


def test_an_encoder_writes_no_text() -> None:
    info = msgspec.structs.replace(scripted_model().info, can_generate=False)
    check_request(generate("r", max_tokens=0, read=Read(pool="mean")), info)
    for wanted in (generate("r"), generate("r", max_tokens=0, read=Read(first=1)), generate("r", max_tokens=1, read=Read(pool="mean"))):
        with pytest.raises(RequestError, match="embeddings"):
            check_request(wanted, info)


def test_large_readings_go_up_in_several_messages() -> None:
    half = Reading([TokenLogprob(-1.0, [])] * (MAX_READ_LOGPROBS // 2))
    events = [Event("a", 0, [], reading=half), Event("b", 0, [1]), Event("c", 0, [], reading=half), Event("d", 0, [], reading=half)]
    assert [[event.request_id for event in parcel] for parcel in parcels(events)] == [["a", "b", "c"], ["d"]]
    assert parcels([]) == [[]]


def test_the_largest_reading_fits_one_message() -> None:
    num_top = 20
    token = TokenLogprob(-1.2345, [(VOCAB * 1000 + at, -1.2345) for at in range(num_top)])
    reading = Reading([token] * (MAX_READ_LOGPROBS // (1 + num_top)))
    assert len(encode_frame(Delivery([Event("a", 0, [], reading=reading)], []))) < MAX_FRAME_BYTES
