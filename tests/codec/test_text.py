"""TextStream: whatever the ids, the pushes and the stop strings, the same text, and token counts that fit it."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.codec.text import StopStrings, TextDelta, TextStream
from service.codec.tokenizer import Tokenizer
from tests.codec.tiny import tokenizer_of

WORDS = ["ab", "abc", "é", "日本", "😀", " ", "\n", "stop", "\ufffd"]
# Every byte alone, so that characters are cut anywhere and invalid ones arise; whole words; and tokens that cross borders.
TOKENIZER = tokenizer_of([bytes([b]) for b in range(256)] + [w.encode() for w in WORDS] + [b"", "a😀".encode()[:3], "😀b".encode()[2:]])
ANY_ID = st.integers(0, TOKENIZER.vocab_size - 1)
LIKELY_ID = st.sampled_from([*range(0x61, 0x65), *range(256, TOKENIZER.vocab_size), 0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82])
IDS = st.lists(ANY_ID | LIKELY_ID, max_size=40)
STOPS = st.lists(st.text("abcd é😀\ufffd", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> str | None:
    """By definition, character by character: the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len)
    return None


def cut(text: str, stop: str | None, include_stop: bool) -> str:
    return text if stop is None else text[: text.index(stop) + (len(stop) if include_stop else 0)]


def may_begin(text: str, stops: list[str]) -> bool:
    return text == "" or any(stop != text and stop.startswith(text) for stop in stops)


def chunks(ids: list[int], borders: list[int]) -> list[list[int]]:
    edges = [0, *sorted(min(b, len(ids)) for b in borders), len(ids)]
    return [ids[a:b] for a, b in pairwise(edges)]


def run(tokenizer: Tokenizer, pushes: list[list[int]], stops: list[str], include_stop: bool = False) -> tuple[list[TextDelta], TextStream]:
    stream = TextStream(tokenizer, stops, include_stop)
    return [*(stream.push(ids) for ids in pushes), stream.finish()], stream


@settings(max_examples=400)
@given(IDS, st.lists(st.integers(0, 40), max_size=8), STOPS, st.booleans())
def test_deltas_joined_are_the_decoded_text_up_to_the_first_stop(ids: list[int], borders: list[int], stops: list[str], keep: bool) -> None:
    deltas, _ = run(TOKENIZER, chunks(ids, borders), stops, keep)
    whole = TOKENIZER.decode(ids)
    stop = first_stop(whole, stops)
    assert "".join(delta.text for delta in deltas) == cut(whole, stop, keep)
    assert deltas[-1].stop_string == stop
    assert deltas[-1].stopped == (stop is not None)


@settings(max_examples=400)
@given(IDS, STOPS)
@example([237, 160], [])
def test_nothing_is_held_back_longer_than_it_must_be(ids: list[int], stops: list[str]) -> None:
    stream, shown = TextStream(TOKENIZER, stops), ""
    for end, token in enumerate(ids, 1):
        delta = stream.push([token])
        shown += delta.text
        if delta.stopped:
            return
        # An incomplete character decodes to U+FFFD at the end of the text so far, and what Python's decoder takes together (ED A0, half of
        # a surrogate pair) to one for each byte: those alone may be missing.
        so_far = TOKENIZER.decode(ids[:end])
        held = so_far[len(shown) :]
        assert so_far.startswith(shown)
        assert any(may_begin(held[: len(held) - count], stops) for count in range(4) if held.endswith("\ufffd" * count))


@settings(max_examples=400)
@given(IDS, st.lists(st.integers(0, 40), max_size=8), STOPS, st.booleans())
def test_released_tokens_are_those_whose_text_is_shown(ids: list[int], borders: list[int], stops: list[str], keep: bool) -> None:
    stream = TextStream(TOKENIZER, stops, keep)
    text, released = "", 0
    for piece in chunks(ids, borders):
        delta = stream.push(piece)
        text, released = text + delta.text, released + delta.num_tokens
        if delta.stopped:
            break
        assert len(TOKENIZER.decode(ids[:released])) <= len(text), "a token was released before its text"
    else:
        delta = stream.finish()
        text, released = text + delta.text, released + delta.num_tokens
    if not delta.stopped:
        assert released == len(ids) == stream.num_tokens_used
    else:
        assert released <= stream.num_tokens_used <= len(ids)
        assert len(TOKENIZER.decode(ids[:released])) >= len(text)


@settings(max_examples=400)
@given(IDS, STOPS)
def test_tokens_used_are_counted_up_to_the_one_that_completes_the_stop(ids: list[int], stops: list[str]) -> None:
    deltas, stream = run(TOKENIZER, [ids], stops)
    one_by_one, other = run(TOKENIZER, [[token] for token in ids], stops)
    assert stream.num_tokens_used == other.num_tokens_used
    assert sum(d.num_tokens for d in deltas) == sum(d.num_tokens for d in one_by_one)
    used = [end for end in range(len(ids) + 1) if first_stop(run(TOKENIZER, [ids[:end]], [])[0][0].text, stops)]
    assert stream.num_tokens_used == (used[0] if used else len(ids))


def test_a_character_is_shown_once_its_last_byte_is_there() -> None:
    stream = TextStream(TOKENIZER)
    deltas = [stream.push([byte]) for byte in "😀".encode()]
    assert [delta.text for delta in deltas] == ["", "", "", "😀"]
    assert [delta.num_tokens for delta in deltas] == [0, 0, 0, 4]


def test_an_incomplete_character_at_the_end_becomes_one_replacement() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.push([0x61, 0xF0, 0x9F]).text == "a"
    assert stream.finish() == TextDelta("\ufffd", 2)


def test_a_stop_across_tokens_is_cut_and_what_follows_ignored() -> None:
    stream = TextStream(TOKENIZER, ["top p"])
    first = stream.push([ord("s"), ord("t"), ord("o")])
    assert first == TextDelta("s", 1)
    second = stream.push([ord("p"), ord(" "), ord("p"), ord("!")])
    assert second == TextDelta("", 0, True, "top p")
    assert stream.num_tokens_used == 6
    assert stream.push([ord("x")]) == TextDelta("", 0, True, "top p")
    assert stream.num_tokens_used == 6
    assert stream.finish() == TextDelta("", 0, True, "top p")


def test_a_token_that_begins_before_the_cut_is_counted_as_shown() -> None:
    stream = TextStream(TOKENIZER, ["c"])
    assert stream.push([256 + WORDS.index("abc")]) == TextDelta("ab", 1, True, "c")


def test_of_two_stops_complete_at_once_the_longer_wins_and_of_others_the_earlier() -> None:
    assert TextStream(TOKENIZER, ["bc", "abc"]).push([256 + WORDS.index("abc")]) == TextDelta("", 0, True, "abc")
    assert TextStream(TOKENIZER, ["abcd", "bc"]).push(list(b"abcd")) == TextDelta("a", 1, True, "bc")


def test_streams_that_share_their_stop_strings_do_not_disturb_each_other() -> None:
    stops = StopStrings(["abc"])
    one, other = TextStream(TOKENIZER, stops), TextStream(TOKENIZER, stops)
    assert one.push(list(b"xab")) == TextDelta("x", 1)
    assert other.push(list(b"c")) == TextDelta("c", 1)
    assert other.push(list(b"a")) == TextDelta()
    assert one.push(list(b"c")) == TextDelta("", 0, True, "abc")
    assert other.push(list(b"d")) == TextDelta("ad", 2)
