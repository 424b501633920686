"""Pictures through the engine loop: read and drawn by a scripted painter beside the steps, each ended once; codes stay in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from service.engine.engine import Lane
from service.engine.messages import Abort, Event, Generate, ModelInfo, Picture
from service.engine.picture_masks import PictureMasks
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.plan import PictureResult, PictureWork
from service.scheduling.scheduler import Scheduler
from service.vocabulary import PictureIds
from tests.engine import test_loop
from tests.engine.test_loop import run
from tests.fakes import VOCAB, ScriptedRunner, generate, scripted_model

way = test_loop.way  # as there: steps one by one, and one ahead
PICTURES = PictureIds(first_code=500, num_codes=100, rows=2, columns=2, begin_id=700, frame_id=701, end_id=702)
CODES = [500, 501, 502, 503]
PIXELS = bytes(range(48))


class ScriptedPainter:
    """Has its results at the visit after the next; fails what is called "broken". Remembers its batches."""

    def __init__(self) -> None:
        self.on_done: Callable[[], None] = lambda: None
        self.batches: list[list[str]] = []
        self._late: list[list[PictureResult]] = [[], []]

    def begin(self, work: Sequence[PictureWork]) -> None:
        self.batches.append([one.request_id for one in work])
        self._late[-1] += [self._result(one) for one in work]

    def _result(self, one: PictureWork) -> PictureResult:
        if one.request_id == "broken":
            return PictureResult(one.request_id)
        return PictureResult(one.request_id, pixels=PIXELS if one.codes else b"", codes=tuple(CODES) if one.pixels else ())

    def finished(self) -> list[PictureResult]:
        self._late.append([])
        return self._late.pop(0)


class MaskedRunner(ScriptedRunner):
    """Draws the id that it is allowed and that is next to what it would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Any] = []

    def sample(self, handle: Any, masks: Any = None) -> Any:
        drawn = super().sample(handle, None)
        self.masks.append(masks)
        if masks is None:
            return drawn
        allowed = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")) for row in masks]
        return [retold(one, ids[one.token % len(ids)]) for one, ids in zip(drawn, allowed, strict=True)]


def retold(one: Any, token: int) -> Any:
    return type(one)(int(token), one.logprob, one.top)


def lane(painter: ScriptedPainter | None = None, runner: ScriptedRunner | None = None, *, picture_pixels: int = 2) -> Lane:
    model = scripted_model()
    info = msgspec.structs.replace(model.info, pictures=PICTURES, picture_pixels=picture_pixels)
    scheduler = Scheduler(
        num_blocks=64, block_size=16, groups=model.groups, max_batch_tokens=64, max_sequences=8, max_context=512, pictures=PICTURES
    )
    runner = runner or MaskedRunner()
    return Lane(info, scheduler, runner, painter, ahead=runner if test_loop.IS_AHEAD else None)


def of(events: list[Event], request_id: str) -> list[Event]:
    return [event for event in events if event.request_id == request_id]


def test_pixels_down_and_codes_up_and_the_other_way() -> None:
    painter = ScriptedPainter()
    mailbox = run([Picture("e", "tiny", pixels=PIXELS), Picture("d", "tiny", codes=CODES)], lanes=[lane(painter)])
    (encoded,), (drawn,) = of(mailbox.events, "e"), of(mailbox.events, "d")
    assert (encoded.tokens, encoded.pixels, encoded.finish) == (CODES, None, "stop")
    assert (drawn.tokens, drawn.pixels, drawn.finish) == ([], PIXELS, "stop")
    assert painter.batches == [["e", "d"]]


def test_chats_go_on_while_pictures_are_painted() -> None:
    mailbox = run([generate("chat", max_tokens=6), Picture("d", "tiny", codes=CODES)], lanes=[lane(ScriptedPainter())])
    assert of(mailbox.events, "chat")[-1].finish == "length"
    names = [event.request_id for event in mailbox.events]
    assert names.index("d") < len(names) - 1, "it was kept until all else had ended"


def test_a_broken_picture_is_an_error_of_its_own() -> None:
    mailbox = run([Picture("broken", "tiny", codes=CODES), Picture("d", "tiny", codes=CODES)], lanes=[lane(ScriptedPainter())])
    assert (of(mailbox.events, "broken")[0].finish, of(mailbox.events, "broken")[0].error_status) == ("error", 500)
    assert of(mailbox.events, "d")[0].pixels == PIXELS


def test_aborted_while_it_is_painted() -> None:
    mailbox = run([Picture("d", "tiny", codes=CODES)], [Abort("d")], lanes=[lane(ScriptedPainter())])
    assert [event.finish for event in of(mailbox.events, "d")] == ["abort"]


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (Picture("x", "tiny"), "pixels or as codes"),
        (Picture("x", "tiny", pixels=PIXELS, codes=CODES), "pixels or as codes"),
        (Picture("x", "tiny", pixels=PIXELS[:-1]), "48 bytes"),
        (Picture("x", "tiny", codes=CODES[:3]), "4 codes"),
        (Picture("x", "tiny", codes=[1, 2, 3, 4]), "4 codes"),
        (Picture("x", "tiny", codes=CODES, timeout_s=float("nan")), "timeout"),
        (Picture("x", "other", codes=CODES), "no model"),
    ],
)
def test_what_is_no_picture_is_refused(wanted: Picture, word: str) -> None:
    painter = ScriptedPainter()
    (event,) = run([wanted], lanes=[lane(painter)]).events
    assert event.finish == "error"
    assert 400 <= event.error_status < 500
    assert word in (event.error or "")
    assert painter.batches == []


def test_a_model_without_its_image_tokenizer_refuses() -> None:
    (event,) = run([Picture("x", "tiny", codes=CODES)], lanes=[lane(None, picture_pixels=0)]).events
    assert (event.finish, event.error_status) == ("error", 400)


@pytest.mark.parametrize(
    "more",
    [
        {"pictures": PictureRule(1, kept=(500,))},
        {"pictures": PictureRule(-1)},
        {"guidance": float("inf"), "unconditional": [1]},
        {"unconditional": [VOCAB]},
        {"draft_len": 65},
        {"pictures": PictureRule(1), "grammar": "start: /a/"},
    ],
)
def test_orders_that_can_not_be_are_refused(more: dict[str, Any]) -> None:
    (event,) = run([generate("x", **more)], lanes=[lane()]).events
    assert (event.finish, event.error_status) in {("error", 400), ("error", 500)}


def test_a_picture_is_as_many_codes_and_then_over() -> None:
    mailbox = run([generate("p", [1, 700], max_tokens=50, pictures=PictureRule(2))], lanes=[lane()])
    ids = [token for event in of(mailbox.events, "p") for token in event.tokens]
    assert [PICTURES.is_code(token) for token in ids] == [True] * 4 + [False] + [True] * 4
    assert ids[4] == 701
    assert of(mailbox.events, "p")[-1].finish == "stop"
    assert [len(event.tokens) for event in of(mailbox.events, "p")].count(2) == 1, "the mark between frames took a step of its own"


def test_kept_codes_come_without_being_drawn() -> None:
    wanted = generate("p", [1, 700, 510], max_tokens=50, pictures=PictureRule(1, kept=(510, -1, 511, 512)))
    runner = MaskedRunner()
    mailbox = run([wanted], lanes=[lane(None, runner)])
    events = of(mailbox.events, "p")
    assert [token for event in events for token in event.tokens][1:] == [511, 512]
    assert len(runner.steps) == 1


def test_words_have_no_codes_unless_pictures_are_asked_for() -> None:
    runner = MaskedRunner()
    run([generate("t", max_tokens=40)], lanes=[lane(None, runner)])
    masks = PictureMasks(PICTURES, VOCAB)
    assert all((each == masks.rows["text"]).all() for mask in runner.masks for each in mask)


def test_a_choice_that_may_say_nothing_any_more_ends_with_the_clients_error() -> None:
    """Behind its picture a frame or the end must come, and both are stop ids that must not be drawn yet."""
    wanted = generate("p", max_tokens=60, min_tokens=50, stop_ids=(701, 702), pictures=PictureRule(is_free=True))

    class Eager(MaskedRunner):
        """Begins a picture as soon as it may."""

        def sample(self, handle: Any, masks: Any = None) -> Any:
            drawn = super().sample(handle, masks)
            may_begin = masks is not None and bool(masks[0][700 // 32] >> (700 % 32) & 1)
            return [retold(one, 700) for one in drawn] if may_begin else drawn

    mailbox = run([wanted, generate("other", max_tokens=5)], lanes=[lane(None, Eager())])
    end = of(mailbox.events, "p")[-1]
    assert (end.finish, end.error_status) == ("error", 400)
    assert "stop id" in (end.error or "")
    assert of(mailbox.events, "other")[-1].finish in ("length", "error")


def test_masks_say_what_they_are_called() -> None:
    rows = {
        name: np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        for name, row in PictureMasks(PICTURES, VOCAB).rows.items()
    }
    everything = set(range(VOCAB))
    assert set(rows["codes"]) == set(range(500, 600))
    assert set(rows["text"]) == everything - set(range(500, 600)) - {700, 701, 702}
    assert set(rows["any"]) == set(rows["text"]) | {700}
    assert set(rows["between"]) == {701, 702}


def test_messages_cross_the_wire() -> None:
    wanted = generate("p", [1, 700], pictures=PictureRule(1, kept=(-1, 500, -1, -1)), unconditional=[1, 700], guidance=2.0, draft_len=8)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wanted), type=Generate) == wanted
    assert wanted.num_prompt_tokens == 4
    info = ModelInfo("m", 1, 2, "int8", 3, 4, 5, 6, pictures=PICTURES, picture_pixels=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=ModelInfo).picture_size == (8, 8)
