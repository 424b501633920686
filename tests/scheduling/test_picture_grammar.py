"""Where pictures may stand: exactly rows x columns codes behind a begin or frame id, and nowhere else a code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.grammar import GrammarError
from service.scheduling.picture_grammar import PictureGrammar, PictureRule
from service.vocabulary import PictureIds

PICTURES = PictureIds(first_code=10, num_codes=6, rows=2, columns=3, begin_id=1, frame_id=2, end_id=3)
WORD, EOS = 5, 4


def take(grammar: PictureGrammar, *ids: int) -> bool:
    return [grammar.accept(token) for token in ids][-1]


def test_a_picture_is_over_with_its_last_code() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(1), 100)
    assert (grammar.allowed, grammar.num_free, grammar.forced()) == ("codes", 6, ())
    assert not take(grammar, 10, 11, 12, 13, 14)
    assert grammar.num_free == 1
    assert take(grammar, 15)


def test_frames_follow_each_other_without_being_drawn() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(2), 100)
    assert not take(grammar, *[10] * 6)
    assert grammar.forced() == (2,)
    assert not take(grammar, 2)
    assert (grammar.allowed, grammar.num_free, grammar.forced()) == ("codes", 6, ())
    assert take(grammar, *[10] * 6)


def test_kept_codes_come_by_themselves() -> None:
    rule = PictureRule(1, kept=(10, -1, 12, 13, -1, 15))
    assert rule.num_known == 1
    grammar = PictureGrammar(PICTURES, rule, 100)
    assert (grammar.forced(), grammar.num_free) == ((), 1)
    assert not take(grammar, 14)
    assert grammar.forced() == (12, 13)
    assert not take(grammar, 12, 13)
    assert grammar.forced() == ()
    assert not take(grammar, 10)
    assert grammar.forced() == (15,)
    assert take(grammar, 15)


def test_only_the_first_of_two_frames_keeps_something() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(2, kept=(10, 11, 12, 13, 14, -1)), 100)
    assert not take(grammar, 15, 2)
    assert (grammar.forced(), grammar.num_free) == ((), 6)


def test_words_alone() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(), 100)
    assert grammar.allowed == "text"
    assert not take(grammar, WORD, WORD)
    assert grammar.allowed == "text"


def test_words_and_pictures_as_the_model_likes() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(is_free=True), 100)
    assert grammar.allowed == "any"
    take(grammar, WORD, 1)
    assert grammar.allowed == "codes"
    take(grammar, *[10] * 6)
    assert grammar.allowed == "between"
    take(grammar, 2, *[10] * 6, 3)
    assert grammar.allowed == "any"


def test_a_picture_that_would_be_cut_is_not_begun() -> None:
    grammar = PictureGrammar(PICTURES, PictureRule(is_free=True), 8)
    assert grammar.allowed == "any"  # begin, six codes, end
    take(grammar, WORD)
    assert grammar.allowed == "text"


def test_a_frame_that_would_be_cut_is_not_begun() -> None:
    """Behind a picture that just fits its end has to come; with room for another frame and its end the model may choose."""
    for max_tokens, forced in ((8 + 1, (3,)), (7 + 8, ())):
        grammar = PictureGrammar(PICTURES, PictureRule(is_free=True), max_tokens)
        take(grammar, 1, *[10] * 6)
        assert grammar.forced() == forced


@pytest.mark.parametrize(
    ("rule", "ids"),
    [
        (PictureRule(1), (WORD,)),
        (PictureRule(1), (10, 10, 3)),
        (PictureRule(), (10,)),
        (PictureRule(), (3,)),
        (PictureRule(is_free=True), (2,)),
        (PictureRule(is_free=True), (1, *[10] * 6, 10)),
        (PictureRule(is_free=True), (1, *[10] * 6, WORD)),
    ],
)
def test_what_does_not_fit_is_an_error(rule: PictureRule, ids: tuple[int, ...]) -> None:
    with pytest.raises(GrammarError):
        take(PictureGrammar(PICTURES, rule, 100), *ids)


@pytest.mark.parametrize(
    "rule",
    [
        PictureRule(-1),
        PictureRule(1, is_free=True),
        PictureRule(0, kept=(10,) * 6),
        PictureRule(1, kept=(10, -1)),
        PictureRule(1, kept=(10, -1, 16, 10, 10, 10)),
        PictureRule(1, kept=(10,) * 6),
        PictureRule(2, kept=(10,) * 6),
    ],
)
def test_rules_that_can_not_be(rule: PictureRule) -> None:
    with pytest.raises(ValueError, match=r"."):
        rule.check(PICTURES)


@given(st.lists(st.integers(0, 15), max_size=40), st.booleans(), st.integers(0, 3), st.lists(st.integers(9, 15), min_size=6, max_size=6))
def test_any_answer_is_in_order(wishes: list[int], is_free: bool, num_frames: int, kept: list[int]) -> None:
    """Whatever a model wants, drawn under the masks it gives an answer in which every run of codes is whole, but for the last."""
    own = tuple(token if token > 9 else -1 for token in kept)
    rule = PictureRule(num_frames, kept=own if num_frames and min(own) < 0 else ()) if num_frames else PictureRule(is_free=is_free)
    grammar = PictureGrammar(PICTURES, rule, 50)
    said, is_over = list(rule.kept[: rule.num_known]), False
    for wish in wishes:
        if is_over:
            break
        allowed = {
            "codes": range(10, 16),
            "text": (EOS, WORD, 6, 7, 8, 9, 0),
            "any": (1, EOS, WORD, 6, 7, 8, 9, 0),
            "between": (2, 3),
        }[grammar.allowed]
        token = allowed[wish % len(allowed)]
        said.append(token)
        is_over = grammar.accept(token)
        while not is_over and (forced := grammar.forced()):
            for token in forced:
                said.append(token)
                is_over = grammar.accept(token)
    codes = "".join("c" if token >= 10 else "f" if token == 2 else "b" if token == 1 else "e" if token == 3 else "w" for token in said)
    runs = [run for run in codes.replace("f", " ").replace("b", " ").replace("e", " ").replace("w", " ").split(" ") if run]
    assert all(len(run) == 6 for run in runs[:-1])
    assert not runs or len(runs[-1]) <= 6
    if num_frames:
        assert len(runs) <= num_frames
        assert set(codes) <= {"c", "f"}
        first = [token for token in said if token >= 10][:6]
        assert all(given in (-1, token) for given, token in zip(rule.kept, first, strict=False))
    elif not is_free:
        assert "c" not in codes
