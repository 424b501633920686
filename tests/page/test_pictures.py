"""The chat page with a model that sees and draws: what is shown of an answer, what is attached and sent, and what is never shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import FilePayload, Page, Request, Route, expect

from tests.api.fakes import MODEL, Running
from tests.page.painter import COLOUR, DRAWN, SEEN, painting, picture_file, picture_of
from tests.page.window import CHROMIUM, OpenPage, ask, screenshot

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; CHROMIUM can name one"),
]
# Hands a file to what a person would hand it to: `kind` is paste or drop.
HAND = """([kind, selector, name, type, data, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], name, { type }));
    if (text) transfer.setData("text/plain", text);
    const options = { bubbles: true, cancelable: true };
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
        : new DragEvent(kind, { ...options, dataTransfer: transfer });
    return document.querySelector(selector).dispatchEvent(event);
}"""
CHATS = "JSON.parse(localStorage.getItem('braid.conversations'))"


@pytest.fixture
def painter() -> Iterator[Running]:
    with painting() as server:
        yield server


def bodies_of(page: Page) -> list[dict[str, Any]]:
    """Fills up with the chats that the page asks for."""
    found: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            found.append(json.loads(request.post_data or ""))

    page.on("request", note)
    return found


def done(page: Page, count: int = 1) -> None:
    """Waits until that many answers are there as a whole."""
    expect(page.locator(".message.assistant .stats")).to_have_count(count)
    expect(page.locator("body.is-running")).to_have_count(0)
    expect(page.locator(".note.bad")).to_have_count(0)


def png(width: int, height: int, name: str = "cat.png") -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": picture_file(width, height)}


def answering(page: Page, *deltas: dict[str, Any]) -> None:
    """From now on all chats are answered with these deltas."""
    lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas]
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    body = "".join([*lines, f"data: {json.dumps(usage)}\n\n", "data: [DONE]\n\n"])

    def answer(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)


def images(*urls: object) -> dict[str, Any]:
    return {"images": [{"type": "image_url", "image_url": {"url": url}, "index": index} for index, url in enumerate(urls)]}


def test_a_drawing_is_shown_kept_and_sent_back(painter: Running, open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(painter, viewport={"width": 1200, "height": 820}, color_scheme="light")
    bodies = bodies_of(page)
    ask(page, "Draw a red square.")
    done(page)
    assert bodies[0]["modalities"] == ["text", "image"]
    reply = page.locator(".message.assistant")
    expect(reply.locator(".text + .pictures .drawing")).to_have_count(1)
    expect(reply.locator(".text")).to_have_text("Here you are.")
    drawing = page.get_by_role("img", name="Picture 1, drawn by the model, for: Draw a red square.")
    expect(drawing).to_be_in_viewport(ratio=1)
    assert drawing.evaluate("(image) => [image.naturalWidth, image.width, image.height]") == [32, 192, 192]
    assert drawing.evaluate("(image) => getComputedStyle(image).imageRendering") == "auto"
    url = drawing.get_attribute("src") or ""
    assert picture_of(url).convert("RGB").getpixel((16, 16)) == COLOUR
    with page.expect_download() as download:
        page.get_by_role("link", name="Download picture 1").click()
    assert download.value.suggested_filename == "braid-1.png"
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == base64.b64decode(url.partition(",")[2])
    screenshot(page, "drawing")

    ask(page, "And a blue one.")
    done(page, 2)
    told = {"role": "assistant", "content": "Here you are.", "images": [{"type": "image_url", "image_url": {"url": url}}]}
    assert bodies[1]["messages"][1] == told
    assert painter.codec.asked["messages"][1]["content"] == [{"type": "text", "text": "Here you are."}, {"type": "image"}]
    assert painter.codec.asked["pictures"] == [tuple(map(ord, DRAWN))[1:5]]  # as the codes that were drawn
    page.reload()
    page.click(".entry .open")
    expect(page.locator(".drawing img")).to_have_count(2)


def test_an_answer_may_be_a_picture_alone(open_page: OpenPage) -> None:
    with painting(DRAWN + DRAWN) as server:
        page = open_page(server)
        bodies = bodies_of(page)
        ask(page, "Draw")
        done(page)
        expect(page.locator(".drawing img")).to_have_count(2)
        expect(page.get_by_role("button", name="Copy")).to_have_count(0)
        ask(page, "Again")
        done(page, 2)
        assert bodies[1]["messages"][1]["content"] == ""
        assert len(bodies[1]["messages"][1]["images"]) == 2


def test_an_attached_picture_is_sent_before_the_text_and_shown(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter, viewport={"width": 1200, "height": 820}, color_scheme="light")
    bodies = bodies_of(page)
    files = [png(40, 20), png(8, 8, "dot.png")]
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach pictures").click()
    chooser.value.set_files(files)
    expect(page.get_by_role("group", name="Attached pictures").get_by_role("img")).to_have_count(2)
    expect(page.get_by_role("img", name="Attached picture 1: cat.png")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("Pictures attached: 2.")
    screenshot(page, "attached")
    page.get_by_role("button", name="Remove picture 2").press("Enter")
    expect(page.get_by_role("button", name="Remove picture 1")).to_be_focused()
    ask(page, "What is this?")
    done(page)
    expect(page.locator("#attached")).to_be_hidden()
    url = f"data:image/png;base64,{base64.b64encode(files[0]['buffer']).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    assert bodies[0]["messages"] == [{"role": "user", "content": parts}]
    assert painter.codec.asked["pictures"] == [SEEN]
    expect(page.locator(".message.user .pictures + .text")).to_have_text("What is this?")
    expect(page.locator(".message.user").get_by_role("img", name="Attached picture 1")).to_have_attribute("src", url)
    page.locator(".message.user").get_by_text("Edit").click(force=True)
    expect(page.locator("#attached img")).to_have_attribute("src", url)
    page.fill("#prompt", "")
    page.keyboard.press("Enter")
    done(page)
    assert bodies[1]["messages"] == [{"role": "user", "content": parts[:1]}]


def test_removing_the_last_picture_leads_back_to_the_text(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter)
    page.set_input_files("#file", png(8, 8))
    page.get_by_role("button", name="Remove picture 1").press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#attached")).to_be_hidden()


@pytest.mark.parametrize(("width", "height", "sent"), [(2000, 1000, (1024, 512)), (1024, 1024, (1024, 1024)), (3, 4000, (1, 1024))])
def test_only_large_pictures_are_scaled_down(painter: Running, open_page: OpenPage, width: int, height: int, sent: tuple[int, int]) -> None:
    page = open_page(painter)
    bodies = bodies_of(page)
    page.set_input_files("#file", png(width, height))
    expect(page.locator("#attached img")).to_have_count(1)
    ask(page, "What is this?")
    done(page)
    url = bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;" if (width, height) == sent else "data:image/jpeg;")
    image = picture_of(url).convert("RGB")
    assert image.size == sent
    pixel = image.getpixel((0, sent[1] // 2))
    assert isinstance(pixel, tuple)
    assert all(abs(found - wanted) < 8 for found, wanted in zip(pixel, COLOUR, strict=True))


def test_pictures_can_be_pasted_and_dropped(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter)
    data = base64.b64encode(picture_file(8, 8)).decode()
    # Cells of a spreadsheet come as text and as a picture of it.
    assert page.evaluate(HAND, ["paste", "#prompt", "image.png", "image/png", data, "some text"])
    page.evaluate(HAND, ["paste", "#prompt", "image.png", "image/png", data, ""])
    expect(page.locator("#attached img")).to_have_count(1)
    # False: the page has taken care of it, so that the browser does not open the file.
    assert page.evaluate(HAND, ["dragover", "#thread", "two.png", "image/png", data, ""]) is False
    expect(page.locator("body.is-dropping")).to_have_count(1)
    assert page.evaluate(HAND, ["drop", "#thread", "two.png", "image/png", data, ""]) is False
    expect(page.locator("#attached img")).to_have_count(2)
    expect(page.locator("body.is-dropping")).to_have_count(0)
    # A kind that the server does not read is drawn anew; what is no picture is said.
    bitmap = base64.b64encode(picture_file(8, 8, "BMP")).decode()
    page.evaluate(HAND, ["drop", "#thread", "three.bmp", "image/bmp", bitmap, ""])
    expect(page.locator("#attached img")).to_have_count(3)
    assert (page.locator("#attached img").last.get_attribute("src") or "").startswith("data:image/jpeg;base64,")
    page.evaluate(HAND, ["drop", "#thread", "notes.png", "image/png", base64.b64encode(b"no picture").decode(), ""])
    expect(page.get_by_role("status")).to_have_text("notes.png can’t be read as a picture.")
    expect(page.locator("#notice")).to_have_class("note bad")
    page.set_input_files("#file", [png(8, 8, f"{number}.png") for number in range(14)])
    expect(page.get_by_role("status")).to_have_text("A message can have 16 pictures.")
    expect(page.locator("#attached img")).to_have_count(16)


def test_only_pictures_as_data_are_shown(painter: Running, open_page: OpenPage) -> None:
    """The page is held to no request to others by `open_page`."""
    page = open_page(painter)
    bodies = bodies_of(page)
    good = f"data:image/png;base64,{base64.b64encode(picture_file(8, 8)).decode()}"
    scripts = ["javascript:window.hacked=1", "data:text/html,<script>window.hacked=2</script>", "data:image/svg+xml;base64,PHN2Zy8+"]
    others = ["http://127.0.0.1:9/c.png", "//127.0.0.1:9/c.png", "blob:null/1", " " + good, "", None, 7, ["data:image/png;base64,"]]
    broken = {"images": [None, {}, {"image_url": None}, "data:image/png;base64,AAAA"]}
    answering(page, {"content": "Look:"}, images(*scripts), images(*others), broken, images(good))
    ask(page, "Draw")
    done(page)
    expect(page.locator(".message.assistant .text")).to_have_text("Look:")
    assert page.locator("#messages img").evaluate_all("(all) => all.map((one) => one.getAttribute('src'))") == [good]
    assert page.locator("#messages a").evaluate_all("(all) => all.map((one) => one.getAttribute('href'))") == [good]
    # Nor what somebody has put into the storage.
    page.evaluate(
        f"""(url) => {{
        const chats = {CHATS};
        chats[0].messages[0].images = [url];
        chats[0].messages[1].images.unshift(url);
        localStorage.setItem("braid.conversations", JSON.stringify(chats));
    }}""",
        others[0],
    )
    page.reload()
    page.click(".entry .open")
    expect(page.locator(".message.assistant .text")).to_have_text("Look:")
    expect(page.locator("#messages img")).to_have_count(1)
    ask(page, "Again")
    done(page, 2)
    assert [len(message.get("images", [])) for message in bodies[1]["messages"]] == [0, 1, 0]
    assert all(isinstance(message["content"], str) for message in bodies[1]["messages"])
    assert page.evaluate("window.hacked") is None


def test_a_model_of_text_gets_no_pictures(server: Running, open_page: OpenPage) -> None:
    page = open_page(server)
    bodies = bodies_of(page)
    expect(page.locator("#model option")).to_have_count(1)
    expect(page.locator("#attach")).to_be_hidden()
    data = base64.b64encode(picture_file(8, 8)).decode()
    page.evaluate(HAND, ["paste", "#prompt", "image.png", "image/png", data, ""])
    assert page.evaluate(HAND, ["drop", "#thread", "image.png", "image/png", data, ""]) is False
    ask(page, "Hello")
    done(page)
    expect(page.locator("img[alt^=Attached]")).to_have_count(0)
    assert "modalities" not in bodies[0]
    assert bodies[0]["messages"] == [{"role": "user", "content": "Hello"}]


def test_pictures_stay_behind_when_a_chat_goes_on_with_a_model_of_text(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter)
    bodies = bodies_of(page)
    page.set_input_files("#file", png(8, 8))
    expect(page.locator("#attached img")).to_have_count(1)
    ask(page, "Draw")
    done(page)
    painter.engine.infos[MODEL] = msgspec.structs.replace(painter.engine.infos[MODEL], picture_pixels=0)
    page.reload()
    page.click(".entry .open")
    expect(page.locator("#attach")).to_be_hidden()
    expect(page.locator("#messages img")).to_have_count(2)
    ask(page, "And now?")
    done(page, 2)
    told = [("user", "Draw"), ("assistant", "Here you are."), ("user", "And now?")]
    assert [(message["role"], message["content"]) for message in bodies[1]["messages"]] == told
    assert "modalities" not in bodies[1]


def test_the_newest_pictures_are_sent_where_there_are_too_many(open_page: OpenPage) -> None:
    with painting(DRAWN * 10) as server:
        page = open_page(server)
        bodies = bodies_of(page)
        for count, text in enumerate(["one", "two", "three"], 1):
            ask(page, text)
            done(page, count)
        assert [len(message.get("images", [])) for message in bodies[2]["messages"]] == [0, 6, 0, 10, 0]


def test_storage_that_is_full_loses_pictures_first_and_the_oldest(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter)
    for text in ("first", "second"):
        ask(page, text)
        done(page)
        page.click("#new")
    # The first chat's picture is as large as they come, and there is no room for another letter.
    page.evaluate(f"""() => {{
        const chats = {CHATS};
        chats[1].messages[1].images[0] += "A".repeat(2 ** 20);
        localStorage.setItem("braid.conversations", JSON.stringify(chats));
        for (let size = 2 ** 23, filler = ""; size >= 1; size /= 2) {{
            try {{ localStorage.setItem("filler", filler + "x".repeat(size)); filler += "x".repeat(size); }} catch {{ }}
        }}
    }}""")
    page.reload()
    expect(page.locator(".entry")).to_have_count(2)
    ask(page, "third")
    done(page)
    kept = page.evaluate(CHATS)
    assert [chat["title"] for chat in kept] == ["third", "second", "first"]
    assert [len(chat["messages"][1]["images"]) for chat in kept] == [1, 1, 0]
    page.locator(".entry .open").last.click()
    expect(page.locator(".note")).to_have_text("There was no room in this browser to keep the pictures of this message.")
    expect(page.locator(".message.assistant .text")).to_have_text("Here you are.")


def test_without_any_storage_chats_last_as_long_as_the_page(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter)
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }")
    ask(page, "first")
    done(page)
    page.click("#new")
    page.click("#theme")
    page.locator(".entry .open").click()
    expect(page.locator(".drawing img")).to_have_count(1)


def test_pictures_fit_a_phone(painter: Running, open_page: OpenPage) -> None:
    page = open_page(painter, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    page.set_input_files("#file", [png(1000, 100, f"{number}.png") for number in range(5)])
    expect(page.locator("#attached img")).to_have_count(5)
    screenshot(page, "phone-attached")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ask(page, "Draw")
    done(page)
    screenshot(page, "phone-drawing")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
