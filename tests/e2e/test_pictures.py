"""Pictures by braid-nano behind the real server, through the official SDK where it can: drawn, edited, filmed, and talked about.

Long, because one server answers for all of it. Words are asked for at temperature 0.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from bench.load import serving
from tests.e2e.pictures import (
    CELL,
    CHAT,
    DESCRIBE,
    DRAW,
    EDIT,
    FILM,
    LOWER_HALF,
    NAME,
    PIZZA,
    PLACES,
    PROMPTS,
    SIDE,
    STAR,
    TURTLE,
    VARY,
    WHAT,
    WILD,
    Decoder,
    Stand,
    array,
    check_refused,
    codes_among,
    data_url,
    eventually,
    fields,
    file_of,
    files,
    image_part,
    mask,
    near,
    opened,
    png,
    user,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),  # the SDK's, about OpenAI's own service
    pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning"),  # of its create_variation
]
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    arguments = [NAME, "--device", "cpu", "--data-dir", str(tmp_path_factory.mktemp("data")), "--api-key", KEY]
    with (
        serving("", arguments) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as sdk,
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http,
    ):
        yield Stand(url, sdk, http)


@pytest.fixture
def stand(started: Stand) -> Iterator[Stand]:
    """After each test nothing is left running."""
    yield started
    eventually(started.is_idle)


@pytest.fixture(scope="module")
def star(started: Stand) -> bytes:
    return started.draw(STAR, 3)


@pytest.fixture(scope="module")
def pizza(started: Stand) -> bytes:
    return started.draw(PIZZA, 0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


# -- the same seed is the same picture


def test_a_seed_is_one_picture_alone_in_a_crowd_and_again(stand: Stand) -> None:
    wanted = [(PROMPTS[i % 4], i, {**WILD, "guidance_scale": 2.5 if i % 8 < 4 else 1.0, "cache_salt": "crowd"}) for i in range(16)]

    def one(place: int) -> bytes:
        prompt, seed, more = wanted[place]
        return stand.draw(prompt, seed, **more)

    alone = [one(place) for place in range(16)]
    assert len(set(alone)) == 16
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(16))) == alone
    hits = stand.number("prefix_cache_hits_total")
    assert [one(place) for place in (1, 5)] == [alone[1], alone[5]]
    assert stand.number("prefix_cache_hits_total") >= hits + 32  # a whole block of each prompt


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_choice_is_what_its_own_seed_draws(stand: Stand, guidance: float) -> None:
    choices = stand.draw_all(STAR, 70, n=4, guidance_scale=guidance, **WILD)
    assert len(set(choices)) == 4
    assert choices == [stand.draw(STAR, 70 + index, guidance_scale=guidance, **WILD) for index in range(4)]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("more", [{}, WILD], ids=["tame", "wild"])
def test_guessing_ahead_changes_no_picture(stand: Stand, guidance: float, more: dict[str, Any]) -> None:
    for seed in range(2):
        plain, guessed = (stand.draw(STAR, seed, jacobi=length, guidance_scale=guidance, **more) for length in (0, 8))
        assert guessed == plain


def test_guidance_is_at_work(stand: Stand) -> None:
    assert stand.draw(STAR, 1, guidance_scale=2.5, **WILD) != stand.draw(STAR, 1, **WILD)


def test_without_a_seed_the_answer_tells_it(stand: Stand) -> None:
    answers = [stand.http.post(DRAW, json={"prompt": TURTLE, "n": 2, **WILD}).json()["data"] for _ in range(2)]
    seeds = [each["seed"] for answer in answers for each in answer]
    assert len(set(seeds)) == 4
    again = [stand.draw(TURTLE, seed, **WILD) for seed in seeds]
    assert again == [base64.b64decode(each["b64_json"]) for answer in answers for each in answer]
    assert len(set(again)) == 4


# -- the picture is the right one


@pytest.mark.parametrize(
    ("prompt", "question", "name"),
    [
        (TURTLE, WHAT, TURTLE),
        ("cat face, noto style", WHAT, "cat face, noto style"),
        ("猫脸，诺托风格", WHAT, "cat face, noto style"),
        (PIZZA, "这是什么？", "披萨，诺托风格"),
    ],
)
def test_what_is_drawn_is_recognised(stand: Stand, prompt: str, question: str, name: str) -> None:
    picture = stand.draw(prompt, 0)
    assert opened(picture).size == (SIDE, SIDE)
    assert stand.words(picture, question) == name


@pytest.mark.parametrize(
    ("scene", "count", "shape", "colour"),
    [
        ("a big red star in row 1, column 2, on sand", 1, "star", "red"),
        ("a small blue square in row 1, column 4, a big yellow heart in row 2, column 1, on white", 2, "heart", "yellow"),
    ],
)
def test_a_scene_is_drawn_as_it_is_described(stand: Stand, scene: str, count: int, shape: str, colour: str) -> None:
    picture = stand.draw(f"Draw {scene}.", 0)
    assert stand.words(picture, DESCRIBE) == scene
    assert stand.words(picture, "How many things?") == str(count)
    assert stand.words(picture, f"What colour is the {shape}?") == colour


@pytest.mark.parametrize(
    ("before", "order", "after"),
    [
        ("a big red star in row 2, column 2, on white", "Make the star green.", "a big green star in row 2, column 2, on white"),
        ("a big orange square in row 2, column 3, on white", "Make the square red.", "a big red square in row 2, column 3, on white"),
        ("a big yellow star in row 3, column 2, on sky", "Paint the star black.", "a big black star in row 3, column 2, on sky"),
        ("a big red star in row 1, column 2, on sand", "Make the background grey.", "a big red star in row 1, column 2, on grey"),
    ],
)
def test_an_edit_changes_what_it_names_and_nothing_else(stand: Stand, before: str, order: str, after: str) -> None:
    """Two of three seeds must: this model does six edits of ten. These it did with five of five."""
    picture = stand.draw(f"Draw {before}.", 3)
    assert stand.words(picture, DESCRIBE) == before
    edited = [stand.words(stand.edit(picture, order, seed), DESCRIBE) for seed in range(3)]
    assert edited.count(after) >= 2, edited


def test_an_edit_as_json_is_the_one_of_the_form(stand: Stand, star: bytes) -> None:
    body = {"prompt": "Make the star green.", "images": [{"image_url": data_url(star)}], "seed": 4, **WILD}
    answer = stand.http.post(EDIT, json=body).raise_for_status().json()
    assert base64.b64decode(answer["data"][0]["b64_json"]) == stand.edit(star, "Make the star green.", 4, **WILD)
    details = answer["usage"]["input_tokens_details"]
    assert details["image_tokens"] == PLACES
    assert details["text_tokens"] == answer["usage"]["input_tokens"] - PLACES > 0


def test_refining_never_lowers_the_score_and_repeats(stand: Stand) -> None:
    body = {"prompt": STAR, "seed": 5, "refine": 3, **WILD}
    first, second = (stand.http.post(DRAW, json=body).json()["data"][0] for _ in range(2))
    assert first == second
    scores = first["refine_scores"]
    assert len(scores) == 4
    assert scores == sorted(scores)
    assert scores[-1] > scores[0]
    assert base64.b64decode(first["b64_json"]) != stand.draw(STAR, 5, **WILD)


def test_the_best_of_several_are_told_by_their_caption(stand: Stand) -> None:
    answers = []

    def best(n: int) -> list[Any]:
        answers.append(stand.http.post(DRAW, json={"prompt": TURTLE, "seed": 20, "n": n, "best_of": 4, **WILD}).json())
        return list(answers[-1]["data"])

    three = best(3)
    scores, seeds = [each["caption_score"] for each in three], [each["seed"] for each in three]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert len(set(seeds)) == 3
    assert set(seeds) <= {20, 21, 22, 23}
    assert best(1) == three[:1]
    assert answers[-1]["usage"]["output_tokens"] == 4 * PLACES  # what was thrown away as well
    assert base64.b64decode(three[0]["b64_json"]) == stand.draw(TURTLE, seeds[0], **WILD)


# -- streams


def is_near(preview: NDArray[np.int64], picture: NDArray[np.int64], shown: int) -> bool:
    """The decoder looks at what lies below, which a preview does not know: the last row of codes that is shown may differ. Above it the
    mean difference was 0.0 to 1.0 for twelve pictures, and 30 for two different ones."""
    return bool(abs(preview - picture)[: shown - CELL].mean() < 2.5)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_previews_grow_into_the_picture(stand: Stand, count: int) -> None:
    events = list(
        stand.sdk.images.generate(model=NAME, prompt=STAR, stream=True, partial_images=count, extra_body={"seed": 6, "jacobi": 0})
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * count + ["image_generation.completed"]
    *previews, last = events
    assert [event.partial_image_index for event in previews if event.type == "image_generation.partial_image"] == list(range(count))
    assert all((event.size, event.output_format) == ("32x32", "png") for event in events)
    final = base64.b64decode(last.b64_json)
    assert final == stand.draw(STAR, 6)
    picture, other = array(final), array(stand.draw(TURTLE, 6))
    shown = [8 * (index + 1) // (count + 1) * CELL for index in range(count)]
    assert not (picture == 255).all(axis=(1, 2)).any()  # no row of this one is white by itself
    for event, end in zip(previews, shown, strict=True):
        preview = array(base64.b64decode(event.b64_json))
        is_white = (preview == 255).all(axis=(1, 2))
        assert is_white.tolist() == [False] * end + [True] * (SIDE - end)
        assert is_near(preview, picture, end)
        assert not is_near(preview, other, end)
    assert last.type == "image_generation.completed"
    assert (last.usage.output_tokens, last.usage.total_tokens) == (PLACES, PLACES + last.usage.input_tokens)
    assert last.usage.input_tokens > 0


def test_several_pictures_in_one_stream(stand: Stand) -> None:
    more = {"seed": 30, "guidance_scale": 2.5, "jacobi": 4, **WILD}
    events = list(stand.sdk.images.generate(model=NAME, prompt=STAR, n=3, stream=True, partial_images=2, extra_body=more))
    bodies = [event.model_dump() for event in events]
    for choice in range(3):
        own = [body for body in bodies if body["index"] == choice]
        assert own[-1]["type"] == "image_generation.completed"
        # Guesses may bring rows of two previews at once, of which only the later one is shown.
        indexes = [body["partial_image_index"] for body in own[:-1]]
        assert indexes == list(range(len(indexes)))
        assert 1 <= len(indexes) <= 2
        assert own[-1]["seed"] == 30 + choice
        assert base64.b64decode(own[-1]["b64_json"]) == stand.draw(STAR, 30 + choice, guidance_scale=2.5, **WILD)


def test_an_edit_streams_too(stand: Stand, star: bytes) -> None:
    events = list(
        stand.sdk.images.edit(
            model=NAME,
            image=("a.png", star),
            prompt="Make the background grey.",
            stream=True,
            partial_images=2,
            extra_body={"seed": 1, "jacobi": 0},
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert base64.b64decode(events[-1].b64_json) == stand.edit(star, "Make the background grey.", 1)


# -- sizes and formats


@pytest.mark.parametrize("size", [(64, 64), (100, 60), (33, 32), (512, 2048)])
def test_a_larger_size_is_exact_and_a_warning_says_how(stand: Stand, pizza: bytes, size: tuple[int, int]) -> None:
    text = f"{size[0]}x{size[1]}"
    answer = stand.http.post(DRAW, json={"prompt": PIZZA, "seed": 0, "size": text})
    body = answer.json()
    assert body["size"] == text
    assert body["warnings"] == [f"the model draws 32x32; the picture was resampled to {text}"]
    assert answer.headers["x-braid-warnings"] == body["warnings"][0]
    picture, native = opened(base64.b64decode(body["data"][0]["b64_json"])), opened(pizza)
    assert picture.size == size
    # Cut around the centre, not squeezed. As eight by eight fields they differ by 0.4 to 2.6; from the picture turned by 31 to 39.
    left, top = (SIDE - SIDE * min(1, size[0] / size[1])) / 2, (SIDE - SIDE * min(1, size[1] / size[0])) / 2
    box = (left, top, SIDE - left, SIDE - top)
    found, wanted, turned = fields(picture), fields(native, box), fields(native.rotate(90))
    assert abs(found - wanted).mean() < 5
    assert abs(found - turned).mean() > 20


def test_its_own_size_needs_no_warning(stand: Stand) -> None:
    bodies = [
        stand.http.post(DRAW, json={"prompt": TURTLE, "seed": 0, **more}).json() for more in ({}, {"size": "auto"}, {"size": "32x32"})
    ]
    assert len({body["data"][0]["b64_json"] for body in bodies}) == 1
    assert not any("warnings" in body for body in bodies)


@pytest.mark.parametrize(
    "size", ["31x32", "32x31", "1x1", "2049x64", "64x2049", "99999x99999", "64", "0x64", "064x64", "64X64", "axb", "", " "]
)
def test_a_size_that_cannot_be_is_refused(stand: Stand, size: str) -> None:
    check_refused(stand.http.post(DRAW, json={"prompt": TURTLE, "size": size}), "size")


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_formats_and_compression(stand: Stand, form: Any) -> None:
    def made(quality: int) -> bytes:
        return files(
            stand.sdk.images.generate(
                model=NAME, prompt=STAR, output_format=form, output_compression=quality, extra_body={"seed": 0, "size": "64x64"}
            )
        )[0]

    original = array(stand.draw(STAR, 0, size="64x64"))
    fine, coarse = made(100), made(5)
    assert [opened(each).format for each in (fine, coarse)] == [form.upper()] * 2
    assert opened(fine).size == (64, 64)
    assert len(coarse) < len(fine)
    errors = [abs(array(each) - original).mean() for each in (fine, coarse)]
    assert errors[0] <= 2  # webp: 0, jpeg: 1
    assert errors[1] > errors[0] + 1
    check_refused(stand.http.post(DRAW, json={"prompt": STAR, "output_format": form, "output_compression": 101}), "output_compression")


def test_a_url_is_fetched_without_a_key(stand: Stand) -> None:
    answer = stand.sdk.images.generate(
        model=NAME, prompt=TURTLE, n=2, response_format="url", output_format="webp", extra_body={"seed": 0, **WILD}
    )
    assert answer.data
    urls = [str(each.url) for each in answer.data]
    assert not any(each.b64_json for each in answer.data)
    assert len(set(urls)) == 2
    for index, url in enumerate(urls):
        fetched = httpx.get(url)
        assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/webp")
        assert (array(fetched.content) == array(stand.draw(TURTLE, index, **WILD))).all()
    assert httpx.get(f"{stand.url}/v1/models").status_code == 401
    wrong = urls[0][:-1] + ("A" if urls[0][-1] != "A" else "B")
    assert check_refused(httpx.get(wrong), None, "not_found", 404)


# -- masks


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 2), (7, 7)])
def test_a_mask_over_one_cell_keeps_all_other_codes(stand: Stand, pizza: bytes, decoder: Decoder, row: int, column: int) -> None:
    """Exactly: the picture is what the kept codes and one other make. Rounding in another order is worth one level; of the codes by their
    nearness to what stands there it was the first to the ninth."""
    place, kept = 8 * row + column, np.asarray(stand.codes(pizza))
    box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
    results = {stand.edit(pizza, TURTLE, seed, mask(box), **WILD) for seed in range(3)}
    for result in results:
        candidates = np.repeat(kept[None], 16, axis=0)
        candidates[:, place] = decoder.likely(result, place, 16)
        differences = near(decoder.pictures(candidates), result)
        assert differences.min() <= 1
    # A picture in which another code differs too does not pass for one.
    candidates[:, place - 9] = (candidates[:, place - 9] + 500) % 1024
    assert near(decoder.pictures(candidates), result).min() > 1


def test_a_half_redrawn_leaves_the_other_half(stand: Stand, star: bytes, pizza: bytes, decoder: Decoder) -> None:
    """The decoder attends to the whole picture, so that kept codes show a little of what is new elsewhere. A row of codes away from the
    border and further that was at most 9 levels over nine redraws of a plain scene, and 1.6 in the mean over eight of a picture full of
    edges; two different pictures are 30 apart."""
    prompt = "Draw a big red star in row 1, column 2, and a small blue circle in row 4, column 4, on sand."
    files = {"image": ("a.png", star), "mask": ("m.png", mask(LOWER_HALF))}
    answer = stand.http.post(EDIT, files=files, data={"prompt": prompt, "seed": "2", "model": NAME}).json()
    result = base64.b64decode(answer["data"][0]["b64_json"])
    assert abs(array(result) - array(star))[:12].max() <= 12
    assert stand.words(result, DESCRIBE) == prompt.removeprefix("Draw ").removesuffix(".").replace(", and", ",")
    usage = answer["usage"]
    assert (usage["output_tokens"], usage["input_tokens_details"]["image_tokens"]) == (PLACES // 2, PLACES // 2)
    (whole,) = decoder.pictures(np.asarray([stand.codes(pizza)]))  # before the redraw, but through the same codes
    for seed in range(3):
        difference = abs(array(stand.edit(pizza, TURTLE, seed, mask(LOWER_HALF), **WILD)) - whole)
        assert difference[:12].mean() <= 4
        assert difference[16:].mean() > 15
        anew = stand.edit(pizza, TURTLE, seed, mask((0, 0, SIDE, SIDE)), **WILD)  # nothing holds the upper rows
        assert abs(array(anew) - whole)[:12].mean() > 15
        assert anew == stand.draw(TURTLE, seed, **WILD)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_redraw_is_the_same_in_a_crowd_and_with_guesses(stand: Stand, pizza: bytes, guidance: float) -> None:
    hole = mask((12, 0, SIDE, SIDE))

    def redrawn(seed: int, jacobi: int = 0) -> bytes:
        return stand.edit(pizza, TURTLE, seed, hole, guidance_scale=guidance, jacobi=jacobi, **WILD)

    alone = [redrawn(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(redrawn, [0, 1, 2, 3] * 2, [0] * 4 + [8] * 4))
    assert crowd == alone * 2


def test_a_mask_of_any_size_is_cut_as_the_picture_is(stand: Stand, star: bytes) -> None:
    wide = Image.new("RGB", (2 * SIDE, SIDE), (255, 0, 255))
    wide.paste(opened(star), (SIDE // 2, 0))
    square = stand.edit(star, TURTLE, 3, mask((0, 0, SIDE // 2, SIDE)), **WILD)
    assert stand.edit(png(wide), TURTLE, 3, mask((0, 0, SIDE, SIDE), size=wide.size), **WILD) == square
    assert stand.edit(star, TURTLE, 3, mask((0, 0, 100, 200), size=(200, 200)), **WILD) == square
    outside = mask((0, 0, SIDE // 2, SIDE), (3 * SIDE // 2, 0, 2 * SIDE, SIDE), size=wide.size)
    answer = stand.http.post(EDIT, files={"image": ("a.png", png(wide)), "mask": ("m.png", outside)}, data={"prompt": TURTLE})
    assert "nothing" in check_refused(answer, "mask")


@pytest.mark.parametrize(
    ("bad", "code", "says"),
    [(mask(), None, "nothing"), (mask(mode="RGB"), "invalid_image", "alpha"), (b"no picture", "invalid_image", "PNG")],
    ids=["opaque", "no alpha", "no picture"],
)
def test_a_mask_that_cannot_be_used_is_refused(stand: Stand, star: bytes, bad: bytes, code: str | None, says: str) -> None:
    answer = stand.http.post(EDIT, files={"image": ("a.png", star), "mask": ("m.png", bad)}, data={"prompt": TURTLE})
    assert says in check_refused(answer, "mask", code)
    body = {"prompt": TURTLE, "images": [{"image_url": data_url(star)}], "mask": {"image_url": data_url(bad)}}
    assert says in check_refused(stand.http.post(EDIT, json=body), "mask.image_url" if code else "mask", code)


# -- variations


def test_a_variation_keeps_a_share(stand: Stand, star: bytes) -> None:
    before = array(star)
    distances = [
        np.mean([abs(array(stand.vary(star, seed, strength=strength, **WILD)[0]) - before).mean() for seed in range(3)])
        for strength in (0.1, 0.5, 1.0)
    ]
    assert distances[0] * 1.5 < distances[1] < distances[2] / 1.5, distances


def test_a_variation_of_the_least_strength_redraws_one_code(stand: Stand, star: bytes, decoder: Decoder) -> None:
    answer = stand.http.post(VARY, files={"image": ("a.png", star)}, data={"seed": "1", "strength": "0.001", "temperature": "2"}).json()
    result = base64.b64decode(answer["data"][0]["b64_json"])
    assert answer["usage"]["output_tokens"] == 1
    place = answer["usage"]["input_tokens_details"]["image_tokens"]  # those before it are in the prompt
    candidates = np.repeat(np.asarray(stand.codes(star))[None], 16, axis=0)
    candidates[:, place] = decoder.likely(result, place, 16)
    assert near(decoder.pictures(candidates), result).min() <= 1


def test_at_full_strength_a_variation_is_drawn_anew(stand: Stand, star: bytes) -> None:
    assert stand.vary(star, 9, strength=1.0, **WILD)[0] == stand.draw("", 9, **WILD)


def test_a_variation_repeats_by_its_seed(stand: Stand, star: bytes) -> None:
    several = stand.vary(star, 40, n=3, **WILD)
    assert len(set(several)) == 3
    assert [stand.vary(star, 40 + index, **WILD)[0] for index in range(3)] == several
    free = stand.http.post(VARY, files={"image": ("a.png", star)}, data={"temperature": "2", "min_p": "0"}).json()["data"][0]
    assert stand.vary(star, free["seed"], **WILD)[0] == base64.b64decode(free["b64_json"])
    # An edit with neither words nor mask is the same thing.
    answer = stand.http.post(EDIT, files={"image": ("a.png", star)}, data={"seed": "40", "temperature": "2", "min_p": "0"}).json()
    assert base64.b64decode(answer["data"][0]["b64_json"]) == several[0]


@pytest.mark.parametrize(
    ("field", "value"), [("strength", "0"), ("strength", "1.01"), ("strength", "nan"), ("prompt", TURTLE), ("n", "11"), ("size", "8x8")]
)
def test_a_variation_that_cannot_be_is_refused(stand: Stand, star: bytes, field: str, value: str) -> None:
    check_refused(stand.http.post(VARY, files={"image": ("a.png", star)}, data={field: value}), field)


# -- limits


def test_ten_pictures_and_no_more(stand: Stand) -> None:
    assert len(set(stand.draw_all(TURTLE, 0, n=10, **WILD))) == 10
    with pytest.raises(openai.BadRequestError) as refused:
        stand.draw_all(TURTLE, 0, n=11)
    assert refused.value.param == "n"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"partial_images": 1}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"jacobi": 65}, "jacobi"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "big red star " * 400}, "prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused(stand: Stand, more: dict[str, Any], param: str) -> None:
    check_refused(stand.http.post(DRAW, json={"prompt": TURTLE, **more}), param)


def test_an_unknown_model(stand: Stand, star: bytes) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        stand.sdk.images.generate(model="no-such-model", prompt=TURTLE)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    for road in (EDIT, VARY):
        check_refused(stand.http.post(road, files={"image": ("a.png", star)}, data={"model": "no-such-model"}), "model", status=404)
    check_refused(stand.http.post(FILM, json={"model": "no-such-model", "prompt": TURTLE}), "model", status=404)


# -- pictures that can't be read

_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>'
_WHOLE = png(Image.new("RGB", (SIDE, SIDE), (9, 99, 199)).resize((64, 64)))
BAD: dict[str, tuple[str, str]] = {
    "base64": ("data:image/png;base64,!!!!", "invalid_base64_image"),
    "base64 without its padding": ("data:image/png;base64,iVBORw0", "invalid_base64_image"),
    "a file": ("file:///etc/passwd", "invalid_image_url"),
    "a host that is not listed": ("http://example.com/a.png", "invalid_image_url"),
    "this server itself": ("http://127.0.0.1/health", "invalid_image_url"),
    "no URL": ("", "invalid_image_url"),
    "a data URL of text": ("data:text/plain;base64,aGVsbG8=", "invalid_image_url"),
    "SVG": (data_url(_SVG, "image/svg+xml"), "invalid_image"),
    "SVG by another name": (data_url(_SVG), "invalid_image"),
    "half a PNG": (data_url(_WHOLE[: len(_WHOLE) * 2 // 3]), "invalid_image"),
    "nothing": ("data:image/png;base64,", "invalid_image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_by_name(stand: Stand, name: str) -> None:
    url, code = BAD[name]
    content = [{"type": "text", "text": WHAT}, image_part(url)]
    chat = {"model": NAME, "messages": [{"role": "user", "content": content}]}
    check_refused(stand.http.post(CHAT, json=chat), "messages[0].content[1]", code)
    check_refused(stand.http.post(EDIT, json={"prompt": TURTLE, "images": [{"image_url": url}]}), "images[0].image_url", code)
    check_refused(stand.http.post(FILM, json={"prompt": TURTLE, "input_reference": {"image_url": url}}), "input_reference.image_url", code)


def test_the_bad_one_of_several_pictures_is_named(stand: Stand, star: bytes) -> None:
    def refused(*messages: dict[str, Any]) -> httpx.Response:
        return stand.http.post(CHAT, json={"model": NAME, "messages": messages})

    bad = image_part(BAD["SVG"][0])
    check_refused(refused(user(WHAT, star), {"role": "user", "content": [image_part(data_url(star)), bad]}), "messages[1].content[1]")
    drawn = {"role": "assistant", "content": "", "images": [image_part(data_url(star)), bad]}
    check_refused(refused(user(STAR), drawn, user(WHAT)), "messages[1].images[1]", "invalid_image")
    check_refused(refused({"role": "system", "content": [image_part(data_url(star))]}, user(WHAT)), "messages[0].content[0]")


def test_a_chat_has_sixteen_pictures_at_most(stand: Stand, star: bytes) -> None:
    many = user(WHAT, *[star] * 17)
    answer = stand.http.post(CHAT, json={"model": NAME, "messages": [many]})
    assert "16" in check_refused(answer, "messages[0].content[0]")
    # As many as may be sent do not fit this model, which is told as such.
    answer = stand.http.post(CHAT, json={"model": NAME, "messages": [user(WHAT, *[star] * 16)]})
    check_refused(answer, "messages", "context_length_exceeded")
    assert stand.words(star, DESCRIBE)


@pytest.mark.parametrize("road", [EDIT, VARY])
def test_forms_that_lack_or_mistake_the_picture(stand: Stand, star: bytes, road: str) -> None:
    good = ("a.png", star)
    more = {} if road == VARY else {"prompt": TURTLE}
    check_refused(stand.http.post(road, files={"other": good}, data=more), "other")
    check_refused(stand.http.post(road, files=[("n", (None, "1"))], data=more), "image")
    check_refused(stand.http.post(road, files=[("image", (None, "text"))], data=more), "image")
    check_refused(stand.http.post(road, files=[("image[]", good)] * 2, data=more), "image")
    check_refused(stand.http.post(road, files={"image": ("a.svg", _SVG)}, data=more), "image", "invalid_image")


# -- films

MOVES = "The star moves right."


def filmed(stand: Stand, video_id: str) -> list[dict[str, Any]]:
    """How the job looked every time it was asked about, until it ended."""
    seen: list[dict[str, Any]] = []
    end = time.monotonic() + 60
    while not seen or seen[-1]["status"] not in ("completed", "failed"):
        assert time.monotonic() < end
        time.sleep(0.01 if seen else 0)
        seen.append(stand.http.get(f"{FILM}/{video_id}").raise_for_status().json())
    assert seen[-1]["status"] == "completed", seen[-1]["error"]
    return seen


def frames_of(film: bytes) -> list[NDArray[Any]]:
    import av

    with av.open(io.BytesIO(film), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def job(started: Stand, star: bytes) -> tuple[Any, list[dict[str, Any]], Any]:
    """A film of a picture's next four frames, by the SDK: as it began, as it went, as it was told when it was done."""
    begun = started.sdk.videos.create(model=NAME, prompt=MOVES, input_reference=("a.png", star), seconds="4", extra_body={"seed": 1})
    seen = filmed(started, begun.id)
    return begun, seen, started.sdk.videos.retrieve(begun.id)


def test_a_films_job_goes_from_queued_to_completed(stand: Stand, job: tuple[Any, list[dict[str, Any]], Any]) -> None:
    begun, seen, done = job
    assert (begun.object, begun.status, begun.progress, begun.completed_at) == ("video", "queued", 0, None)
    stages = [stage for stage, _ in itertools.groupby(each["status"] for each in seen)]
    assert stages in (["queued", "in_progress", "completed"], ["in_progress", "completed"])
    progress = [each["progress"] for each in seen]
    assert progress == sorted(progress)
    assert max(each["progress"] for each in seen if each["status"] != "completed") < 100 == progress[-1]
    assert (done.status, done.progress, done.error, done.seconds, done.size, done.prompt) == ("completed", 100, None, "4", "32x32", MOVES)
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 3600


def test_the_film_shows_what_was_asked_for(stand: Stand, job: tuple[Any, list[dict[str, Any]], Any]) -> None:
    content = stand.sdk.videos.download_content(job[0].id)
    assert content.response.headers["content-type"] == "video/mp4"
    frames = frames_of(content.read())
    assert [frame.shape for frame in frames] == [(SIDE, SIDE, 3)] * 4
    told = [stand.words(png(frame), DESCRIBE) for frame in frames]
    assert told == [f"a big red star in row 1, column {column}, on sand" for column in (3, 4, 4, 4)]
    thumbnail = stand.sdk.videos.download_content(job[0].id, variant="thumbnail").read()
    assert (opened(thumbnail).format, opened(thumbnail).size) == ("PNG", (SIDE, SIDE))
    assert stand.words(thumbnail, DESCRIBE) == told[0]
    check_refused(stand.http.get(f"{FILM}/{job[0].id}/content?variant=spritesheet"), "variant")


def test_the_same_film_by_json_and_by_seed(stand: Stand, star: bytes, job: tuple[Any, list[dict[str, Any]], Any]) -> None:
    def film(seed: int) -> bytes:
        body = {"model": NAME, "prompt": MOVES, "input_reference": {"image_url": data_url(star)}, "seed": seed}
        video_id = stand.http.post(FILM, json=body).raise_for_status().json()["id"]
        filmed(stand, video_id)
        return stand.http.get(f"{FILM}/{video_id}/content").content

    assert film(1) == stand.sdk.videos.download_content(job[0].id).read()


@pytest.mark.parametrize("form", ["webp", "gif"])
def test_films_as_animations_of_another_size(stand: Stand, form: str) -> None:
    body = {"prompt": TURTLE, "seed": 0, "num_frames": 3, "seconds": "2", "output_format": form, "size": "64x48", **WILD}
    answer = stand.http.post(FILM, json=body)
    assert answer.json()["warnings"] == ["the model draws 32x32; the film was resampled to 64x48"]
    video_id = answer.json()["id"]
    filmed(stand, video_id)
    content = stand.http.get(f"{FILM}/{video_id}/content")
    assert content.headers["content-type"] == f"image/{form}"
    film = Image.open(io.BytesIO(content.content))
    assert (film.format, film.size, film.n_frames) == (form.upper(), (64, 48), 3)  # type: ignore[attr-defined]
    durations = []
    for index in range(3):
        film.seek(index)
        film.load()
        durations.append(film.info["duration"])
    assert sum(durations) in (1990, 2000, 2010)


def test_a_film_that_does_not_fit_is_refused(stand: Stand, star: bytes) -> None:
    check_refused(stand.http.post(FILM, json={"prompt": TURTLE, "num_frames": 8}), "num_frames", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as refused:
        stand.sdk.videos.create(model=NAME, prompt=MOVES, input_reference=("a.png", star), extra_body={"num_frames": 7})
    assert (refused.value.param, refused.value.code) == ("num_frames", "context_length_exceeded")
    for more, param in (
        ({"num_frames": 65}, "num_frames"),
        ({"seconds": "3"}, "seconds"),
        ({"size": "33x32"}, "size"),
        ({"size": "8x8"}, "size"),
    ):
        check_refused(stand.http.post(FILM, json={"prompt": TURTLE, **more}), param)


def test_films_are_listed(stand: Stand, job: tuple[Any, list[dict[str, Any]], Any]) -> None:
    video_id = stand.http.post(FILM, json={"prompt": TURTLE, "num_frames": 1}).json()["id"]
    listed = [video.id for video in stand.sdk.videos.list(limit=1)]  # page after page
    assert listed == [each["id"] for each in stand.http.get(FILM).json()["data"]]
    assert listed[0] == video_id
    assert job[0].id in listed[1:]
    assert [video.id for video in stand.sdk.videos.list(order="asc")] == listed[::-1]
    assert httpx.get(f"{stand.url}{FILM}/{job[0].id}/content").status_code == 401
    filmed(stand, video_id)


def test_a_film_is_deleted_while_it_is_made(stand: Stand) -> None:
    aborted = stand.num_aborted
    video_id = stand.http.post(FILM, json={"prompt": TURTLE, "num_frames": 7, "guidance_scale": 2.0}).json()["id"]
    check_refused(stand.http.get(f"{FILM}/{video_id}/content"), None, status=409)
    deleted = stand.sdk.videos.delete(video_id)
    assert (deleted.id, deleted.deleted) == (video_id, True)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        check_refused(stand.http.request(method, f"{FILM}/{video_id}{path}"), None, "not_found", 404)
    assert video_id not in [each["id"] for each in stand.http.get(FILM).json()["data"]]
    eventually(lambda: stand.num_aborted > aborted, 5)


# -- chats

BOTH: dict[str, Any] = {"modalities": ["text", "image"]}


def test_a_picture_in_a_question_is_understood(stand: Stand, star: bytes) -> None:
    answer = stand.ask([user(DESCRIBE, star)], temperature=0)
    assert answer.choices[0].message.content == "a big red star in row 1, column 2, on sand"
    usage = answer.usage.model_dump()
    assert (usage["prompt_tokens_details"]["image_tokens"], usage["completion_tokens_details"]["image_tokens"]) == (PLACES, 0)
    assert not hasattr(answer.choices[0].message, "images")
    # The question may come before the picture, and pictures of several kinds may be sent.
    file = io.BytesIO()
    opened(star).resize((200, 200), Image.Resampling.NEAREST).save(file, "JPEG", quality=95)
    part = image_part(data_url(file.getvalue(), "image/jpeg"))
    content = [part, {"type": "text", "text": "What colour is the star?"}]
    assert stand.ask([{"role": "user", "content": content}], temperature=0).choices[0].message.content == "red"


def test_a_chat_draws_and_reads_what_it_drew(stand: Stand, decoder: Decoder) -> None:
    answer = stand.ask([user(STAR)], seed=1, extra_body={**BOTH, "return_token_ids": True})
    (choice,) = answer.choices
    message = choice.message.model_dump(exclude_none=True)
    assert (choice.finish_reason, message["content"]) == ("stop", "")
    (part,) = message["images"]
    picture = file_of(part)
    assert (opened(picture).format, opened(picture).size) == ("PNG", (SIDE, SIDE))
    codes = np.asarray(codes_among(choice.model_dump()["token_ids"]))
    assert near(decoder.pictures(codes[None]), picture).max() <= 1
    usage = answer.usage.model_dump()
    assert (usage["prompt_tokens_details"]["image_tokens"], usage["completion_tokens_details"]["image_tokens"]) == (0, PLACES)
    for question, told in (
        (DESCRIBE, "a big red star in row 1, column 2, on sand"),
        ("How many things?", "1"),
        ("What colour is the star?", "red"),
    ):
        turn = stand.ask([user(STAR), message, user(question)], temperature=0)
        assert turn.choices[0].message.content == told
        assert turn.usage.model_dump()["prompt_tokens_details"]["image_tokens"] == PLACES
    # It is the picture that tells it.
    blind = stand.ask([user(STAR), {"role": "assistant", "content": ""}, user(DESCRIBE)], temperature=0)
    assert blind.choices[0].message.content != "a big red star in row 1, column 2, on sand"


def test_several_drawings_in_one_answer(stand: Stand) -> None:
    answer = stand.ask([user(TURTLE)], seed=1, n=2, temperature=1.0, extra_body=BOTH)
    pictures = [[file_of(part) for part in choice.message.images] for choice in answer.choices]
    assert [len(each) for each in pictures] == [1, 1]
    assert [stand.words(each[0], WHAT) for each in pictures] == [TURTLE] * 2
    assert answer.usage.model_dump()["completion_tokens_details"]["image_tokens"] == 2 * PLACES


def test_pictures_of_a_streamed_chat_come_whole_and_once(stand: Stand) -> None:
    more: dict[str, Any] = {"seed": 8, "n": 2}
    whole = stand.ask([user(STAR)], **more, extra_body=BOTH)
    chunks = list(stand.ask([user(STAR)], **more, stream=True, stream_options={"include_usage": True}, extra_body=BOTH))
    streamed: list[list[Any]] = [[], []]
    ended: list[int] = []
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice.delta, "images", None) or []
            assert not streamed[choice.index] or choice.index not in ended
            ended += [choice.index] if choice.finish_reason == "stop" else []
    assert sorted(ended) == [0, 1]
    assert streamed == [choice.message.images for choice in whole.choices]
    assert [part["index"] for parts in streamed for part in parts] == [0, 0]
    assert chunks[-1].usage.model_dump()["completion_tokens_details"]["image_tokens"] == 2 * PLACES


@pytest.mark.parametrize("more", [{}, {"modalities": ["text"]}, {"modalities": None}])
def test_a_chat_of_words_has_no_pictures(stand: Stand, more: dict[str, Any]) -> None:
    """Also where the model would rather draw, streamed or not, among others that do."""

    def words(seed: int) -> Any:
        return stand.ask([user(TURTLE)], seed=seed, extra_body=more)

    with ThreadPoolExecutor(8) as pool:
        drawing = [pool.submit(stand.draw, TURTLE, seed) for seed in range(2)]
        answers = list(pool.map(words, range(4)))
        for each in drawing:
            each.result()
    for answer in answers:
        assert not hasattr(answer.choices[0].message, "images")
        assert "<|" not in answer.choices[0].message.content
        assert answer.usage.model_dump()["completion_tokens_details"]["image_tokens"] == 0
    deltas = [choice.delta for chunk in stand.ask([user(TURTLE)], seed=1, stream=True, extra_body=more) for choice in chunk.choices]
    assert not any(hasattr(delta, "images") for delta in deltas)


# -- clients that leave

_MANY: dict[str, Any] = {"prompt": STAR, "n": 10, "seed": 0, "guidance_scale": 2.5, "jacobi": 0, **WILD}


def asked(stand: Stand, body: dict[str, Any]) -> socket.socket:
    """A request over a socket of its own, whose answer nobody has read yet."""
    content = json.dumps(body).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    raw = socket.create_connection(("127.0.0.1", httpx.URL(stand.url).port or 80), timeout=20)
    raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return raw


@pytest.mark.parametrize("is_streamed", [False, True])
def test_clients_that_leave_in_the_middle_leave_nothing_running(stand: Stand, is_streamed: bool) -> None:
    """Six of ten guided pictures each, gone with most of them still to draw."""
    usage, aborted, drawn = stand.kv_usage, stand.num_aborted, stand.number("generation_tokens_total")
    clients = [asked(stand, {**_MANY, "stream": is_streamed, "partial_images": 3 * is_streamed}) for _ in range(6)]
    try:
        eventually(lambda: stand.number("generation_tokens_total") > drawn + PLACES)
        assert stand.number("num_requests_running") > 0
        assert stand.kv_usage > usage
    finally:
        for client in clients:
            client.close()
    eventually(lambda: stand.is_idle() and stand.kv_usage == usage and stand.num_aborted > aborted, 5)
    assert stand.number("generation_tokens_total") - drawn < 40 * PLACES


def test_a_client_that_leaves_at_its_first_preview(stand: Stand) -> None:
    usage = stand.kv_usage
    client = asked(stand, {**_MANY, "stream": True, "partial_images": 3})
    head = b""
    while b"\nevent: " not in head:
        head += client.recv(4096)
    client.close()
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"event: image_generation.partial_image" in head
    eventually(lambda: stand.is_idle() and stand.kv_usage == usage, 5)


@pytest.mark.parametrize("road", [DRAW, CHAT])
def test_a_client_that_gives_up_waiting_leaves_nothing_running(stand: Stand, road: str) -> None:
    usage, aborted = stand.kv_usage, stand.num_aborted
    chat = {"model": NAME, "messages": [user(STAR)], "n": 32, **BOTH, **WILD}
    with pytest.raises(httpx.ReadTimeout):
        stand.http.post(road, json=chat if road == CHAT else {**_MANY, "best_of": 32}, timeout=httpx.Timeout(10, read=0.1))
    eventually(lambda: stand.is_idle() and stand.kv_usage == usage and stand.num_aborted > aborted, 5)
