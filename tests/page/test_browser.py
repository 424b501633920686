"""The chat page in a real browser, before the real app with a scripted engine: chats, stops, asks for keys, and lets nothing run."""

from __future__ import annotations

import threading

import httpx
import pytest
from playwright.sync_api import expect

from tests.api.fakes import Running, Script
from tests.page.window import CHROMIUM, OpenPage, ask, chatting, screenshot

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; CHROMIUM can name one"),
]
MARKDOWN = """Here is a **short plan**:

1. Wake up
2. Read `house.md`

```python
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)
```

| model | tokens/s |
| --- | --- |
| small | 186 |

> Calm is fast. See [the docs](https://example.org).

That is all."""
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[a](javascript:window.hacked=3) [b](data:text/html,<script>window.hacked=4</script>) ![c](http://127.0.0.1:9/c.png)

<svg onload="window.hacked = 5"></svg><iframe srcdoc="<script>parent.hacked = 6</script>"></iframe>

<style>body { display: none }</style> `<b onclick="window.hacked=7">` **end**"""


def test_streams_an_answer_with_markdown_and_figures(server: Running, open_page: OpenPage) -> None:
    server.engine.script = Script(text=MARKDOWN, waits=0.002, per_event=4, cached_tokens=3)
    page = open_page(server, viewport={"width": 1200, "height": 820}, color_scheme="light")
    expect(page.locator("#context")).to_have_text("2,048 tokens of context")
    screenshot(page, "empty")
    ask(page)
    expect(page.locator("body.is-running")).to_be_attached()
    reply = page.locator(".message.assistant")
    expect(reply.locator(".stats")).to_contain_text("prefill 20 ms")
    expect(reply.locator(".stats")).to_contain_text("3 cached")
    expect(reply.locator(".stats")).to_contain_text("tokens/s")
    expect(reply.locator("ol li")).to_have_count(2)
    expect(reply.locator("pre code")).to_contain_text("def fib(n)")
    expect(reply.locator("td")).to_have_text(["small", "186"])
    expect(reply.locator("a")).to_have_attribute("rel", "noopener noreferrer")
    expect(page.locator(".entry")).to_have_text(["Plan my day, please.✕"])
    screenshot(page, "light")
    page.reload()
    expect(page.locator(".entry")).to_have_count(1)
    page.click(".entry .open")
    expect(page.locator(".message.assistant td")).to_have_text(["small", "186"])
    page.click(".entry .drop")
    expect(page.locator(".entry")).to_have_count(0)


def test_what_is_drawn_bit_by_bit_equals_what_is_drawn_at_once(server: Running, open_page: OpenPage) -> None:
    """The last step of an answer draws the whole; here the pieces are compared with it before that."""
    server.engine.script = Script(text=MARKDOWN, per_event=1, waits=0.001)
    page = open_page(server)
    pieces, whole = page.evaluate(
        """async (text) => {
            const { MarkdownView } = await import("/static/markdown.js");
            const box = document.createElement("div");
            const view = new MarkdownView(box);
            for (const letter of text) { view.push(letter); view.draw(); }
            const pieces = box.textContent;
            view.finish(text);
            return [pieces, box.textContent];
        }""",
        MARKDOWN,
    )
    assert "".join(pieces.split()) == "".join(whole.split())


def test_settings_and_history_are_sent(server: Running, open_page: OpenPage) -> None:
    page = open_page(server)
    page.click("#tune")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#max_tokens", "7")
    ask(page, "one")
    expect(page.locator(".message.assistant .note")).to_contain_text("limit of tokens")
    ask(page, "two")
    expect(page.locator(".message.assistant .stats").last).to_contain_text("prefill")
    first, second = server.engine.requests
    assert bytes(first.prompt) == b"system:Be brief.\nuser:one\n"
    assert (first.sampling.temperature, first.sampling.max_tokens) == (0.5, 7)
    assert bytes(second.prompt).startswith(b"system:Be brief.\nuser:one\nassistant:")
    page.locator(".message.user").first.get_by_text("Edit").click(force=True)
    assert page.input_value("#prompt") == "one"
    expect(page.locator(".message")).to_have_count(0)


def test_stop_ends_the_request(server: Running, open_page: OpenPage) -> None:
    hold = threading.Event()
    server.engine.script = Script(text="a" * 500, hold=hold)
    page = open_page(server)
    ask(page)
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    page.click("#send")
    expect(page.locator(".note")).to_have_text("Stopped.")
    hold.set()
    page.wait_for_timeout(200)
    assert [event.finish for event in server.engine.ended] == ["abort"]
    page.get_by_text("Try again").click()
    expect(page.locator(".message.assistant .stats")).to_contain_text("tokens")
    expect(page.locator(".message.assistant")).to_have_count(1)


def test_an_error_is_shown(server: Running, open_page: OpenPage) -> None:
    server.engine.script = Script(error_after=2)
    page = open_page(server)
    ask(page)
    expect(page.locator(".note.bad")).to_contain_text("it broke")


def test_nothing_that_a_model_writes_runs(server: Running, open_page: OpenPage) -> None:
    server.engine.script = Script(text=HOSTILE, per_event=3)
    page = open_page(server)
    ask(page, "<img src=x onerror='window.hacked=9'>")
    expect(page.locator(".message.assistant .stats")).to_contain_text("prefill")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#messages :is(script, img, svg, iframe, style)").count() == 0
    assert page.locator("#messages a").evaluate_all("(links) => links.map((link) => link.protocol)") in ([], ["http:"])
    expect(page.locator(".message.user .text")).to_have_text("<img src=x onerror='window.hacked=9'>")


def test_the_policy_stops_what_gets_in_all_the_same(server: Running, open_page: OpenPage) -> None:
    page = open_page(server, expected_error="Content Security Policy")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'out', () => 'blocked')") == "blocked"


def test_asks_for_a_key(open_page: OpenPage) -> None:
    with chatting(api_keys=["secret-key"]) as server:
        page = open_page(server, expected_error="401")
        expect(page.locator("#ask")).to_be_visible()
        page.fill("#secret", "secret-key")
        page.click("#ask .primary")
        expect(page.locator("#model option")).to_have_count(1)
        ask(page)
        expect(page.locator(".message.assistant .stats")).to_contain_text("prefill")
        assert page.evaluate("Object.values(localStorage).join().includes('secret-key')") is False


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(server: Running, open_page: OpenPage, scheme: str) -> None:
    server.engine.script = Script(text=MARKDOWN, per_event=8)
    page = open_page(server, viewport={"width": 375, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)
    ask(page)
    expect(page.locator(".message.assistant .stats")).to_contain_text("prefill")
    screenshot(page, f"phone-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = "(nodes) => nodes.filter((node) => node.offsetParent && node.getBoundingClientRect().height < 40).map((node) => node.id)"
    assert page.locator("header button, #composer button").evaluate_all(small) == []
    page.click("#menu")
    expect(page.locator("#new")).to_be_in_viewport()
    page.wait_for_timeout(300)
    screenshot(page, f"phone-menu-{scheme}")
    page.click("#new")
    expect(page.locator("#new")).not_to_be_in_viewport()


def test_dark_and_light_can_be_chosen(server: Running, open_page: OpenPage) -> None:
    server.engine.script = Script(text=MARKDOWN, per_event=8)
    page = open_page(server, viewport={"width": 1200, "height": 820}, color_scheme="dark")

    def paper() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.split("(")[1].split(",")[0])

    assert paper() < 64
    ask(page)
    expect(page.locator(".message.assistant .stats")).to_contain_text("prefill")
    screenshot(page, "dark")
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Theme: light")
    assert paper() > 192
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: light")


def test_the_keyboard_is_enough(server: Running, open_page: OpenPage) -> None:
    page = open_page(server)
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("first line\nsecond")
    expect(page.locator(".message.assistant .stats")).to_contain_text("prefill")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"


def test_models_that_do_not_chat_are_not_offered(server: Running, open_page: OpenPage) -> None:
    server.codec.template = None
    page = open_page(server)
    expect(page.locator("#served")).to_have_text("No model that chats is served here.")
    expect(page.locator("#send")).to_be_disabled()


def test_a_server_that_is_not_ready_is_waited_for(server: Running, open_page: OpenPage) -> None:
    server.engine.state = "loading"
    page = open_page(server, expected_error="503")
    ask(page)
    expect(page.locator(".note.bad")).to_contain_text("loading")
    assert httpx.get(f"{server.url}/health").status_code == 503
