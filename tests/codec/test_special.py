"""Special texts: found where unbroken, broken wherever a message spells one, alone or together with its neighbours."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.special import MARKERS, Special, SpecialTokens
from service.errors import StartupError

MARK = MARKERS[0]
TEXTS = st.lists(st.text("ab<|>", min_size=1, max_size=5), unique=True, max_size=6)


def tokens_of(texts: list[str]) -> SpecialTokens:
    return SpecialTokens(Special(index, text) for index, text in enumerate(texts))


def spelled(special: SpecialTokens, text: str) -> list[str]:
    return [part.text for part in special.split(text) if isinstance(part, Special)]


@given(TEXTS, st.text("ab<|>"))
def test_split_finds_leftmost_longest_and_loses_nothing(texts: list[str], text: str) -> None:
    special = tokens_of(texts)
    parts = list(special.split(text))
    assert "".join(part.text if isinstance(part, Special) else part for part in parts) == text
    by_length = sorted((t for t in texts if len(t) > 1), key=len, reverse=True)
    expected = re.findall("|".join(map(re.escape, by_length)), text) if by_length else []
    assert spelled(special, text) == expected


@given(TEXTS, st.text("ab<|>"))
def test_a_protected_text_spells_nothing_and_is_itself_without_markers(texts: list[str], text: str) -> None:
    special = tokens_of(texts)
    safe = special.protect(text, MARK)
    assert spelled(special, safe) == []
    assert safe.replace(MARK, "") == text


@given(TEXTS, st.text("ab<|>"), st.sampled_from(["", "a", "<", "<|", ">", "b>"]), st.sampled_from(["", "a", ">", "|>", "<", "<a"]))
def test_a_protected_text_makes_nothing_with_one_neighbour(texts: list[str], text: str, before: str, after: str) -> None:
    special = tokens_of(texts)
    safe = special.protect(text, MARK)
    assert spelled(special, before + safe) == spelled(special, before)
    assert spelled(special, safe + after) == spelled(special, after)


def test_spaces_beside_a_stripping_token_belong_to_it() -> None:
    special = SpecialTokens([Special(1, "<l>", strips_left=True), Special(2, "<r>", strips_right=True)])
    parts = [part.text if isinstance(part, Special) else part for part in special.split("a \n<l> b <r>\n c")]
    assert parts == ["a", "<l>", " b ", "<r>", "c"]


def test_many_hundred_specials_are_all_found() -> None:
    special = tokens_of([f"<|reserved_{n}|>" for n in range(1000)])
    text = "x".join(f"<|reserved_{n}|>" for n in range(1000))
    assert len(spelled(special, text)) == 1000
    assert spelled(special, special.protect(text, MARK)) == []


def test_an_absurdly_long_special_is_refused() -> None:
    with pytest.raises(StartupError, match="special token"):
        tokens_of(["<" + "a" * 300 + ">"])
