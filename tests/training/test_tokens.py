"""The tokenizer of braid's own models: what it is trained to, and that every reader of its files reads the same."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from service.codec.prompt import Codec, load_codec
from service.errors import RequestError
from training import tokens
from training.tokens import SPECIALS, export_tokenizer, picture_ids, train_tokenizer, with_codes

SIZE, NUM_CODES = 400, 8
ENGLISH = "a big red star in row 1, column 2, a small blue circle in row 13, column 4, on sand"
CHINESE = "第1行第2列一个大红星，第3行第4列一个小蓝圆，沙色背景"


def corpus() -> list[str]:
    """Words enough for a hundred merges, the same in every run."""
    draw = random.Random(5)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    return [f"{ENGLISH} {CHINESE} don't {' '.join(draw.choices(words, k=20))} {draw.randrange(10**6)}" for _ in range(200)]


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return train_tokenizer(corpus(), SIZE)


@pytest.fixture(scope="module")
def folder(trained: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("braid")
    export_tokenizer(trained, found, NUM_CODES, max_len=512)
    config = {"model_type": "braid", "max_position_embeddings": 512, "eos_token_id": tokens.EOS_ID}
    (found / "model.safetensors").touch()  # the codec looks for it, and opens none
    (found / "config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return load_codec(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text).ids]


def test_the_vocabulary_has_exactly_the_size_and_begins_with_the_special_tokens(trained: tokenizers.Tokenizer) -> None:
    assert trained.get_vocab_size() == SIZE
    assert sorted(trained.get_vocab().values()) == list(range(SIZE))
    assert [trained.id_to_token(token) for token in range(len(SPECIALS))] == list(SPECIALS)
    assert len(SPECIALS) == 16


def test_named_ids_are_places_in_the_list() -> None:
    named = (tokens.PAD_ID, tokens.BOS_ID, tokens.EOS_ID, tokens.USER_ID, tokens.ASSISTANT_ID)
    assert [SPECIALS[token] for token in named] == ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
    assert [SPECIALS[token] for token in (tokens.BEGIN_IMAGE_ID, tokens.FRAME_ID, tokens.END_IMAGE_ID)] == [
        "<|boi|>",
        "<|frame|>",
        "<|eoi|>",
    ]


def test_training_twice_gives_the_same(trained: tokenizers.Tokenizer) -> None:
    assert train_tokenizer(iter(corpus()), SIZE).to_str() == trained.to_str()


def test_too_few_texts_and_too_few_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="more text"):
        train_tokenizer(["a b c"], 2048)
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer(corpus(), 256)


def test_digits_stand_alone_and_words_take_their_space(trained: tokenizers.Tokenizer) -> None:
    assert pieces(trained, "a row 13, column 4") == ["a", " row", " 1", "3", ",", " column", " 4"]


def test_chinese_characters_are_merged_from_their_bytes_and_never_with_each_other(trained: tokenizers.Tokenizer) -> None:
    assert pieces(trained, CHINESE) == list(CHINESE)
    texts = [trained.decode([token]) for token in range(len(SPECIALS), SIZE)]
    assert all(len(text) == 1 for text in texts if any("一" <= char <= "鿿" for char in text))


@given(st.text(max_size=40))
def test_every_text_survives(trained: tokenizers.Tokenizer, text: str) -> None:
    if not any(special in text for special in SPECIALS):
        assert trained.decode(trained.encode(text).ids) == text


def test_codes_follow_the_text_and_decode_away(trained: tokenizers.Tokenizer) -> None:
    full = with_codes(trained, NUM_CODES)
    ids = picture_ids(SIZE, NUM_CODES, 2, 4)
    assert full.get_vocab_size() == SIZE + NUM_CODES
    assert full.token_to_id("<|code_0|>") == ids.first_code == SIZE
    assert full.token_to_id("<|code_7|>") == SIZE + 7
    stream = [*full.encode("star").ids, ids.begin_id, *range(SIZE, SIZE + 8), ids.end_id]
    assert full.decode(stream, skip_special_tokens=True) == "star"
    assert full.decode(stream, skip_special_tokens=False).endswith("<|code_6|><|code_7|><|eoi|>")
    assert trained.get_vocab_size() == SIZE  # the copy is a copy


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "don't 🍕 é e\u0301\n\n x  ", "红星 red星", "", "\ud7ff\uffff"])
def test_the_codec_and_stock_libraries_read_the_same(
    codec: Codec, stock: transformers.PreTrainedTokenizerBase, trained: tokenizers.Tokenizer, text: str
) -> None:
    ids = trained.encode(text).ids
    assert codec.tokenizer.encode(text) == ids
    assert codec.tokenizer.decode(ids) == text
    assert codec.encode_text(text) == stock(text)["input_ids"] == [tokens.BOS_ID, *ids]
    assert stock.decode([*ids, SIZE + 1, tokens.EOS_ID], skip_special_tokens=True) == text


def test_the_codec_knows_the_ends_and_the_whole_vocabulary(codec: Codec) -> None:
    assert codec.vocab_size == SIZE + NUM_CODES
    assert codec.eos_ids == (tokens.EOS_ID,)
    assert codec.tokenizer.ends.bos_id == tokens.BOS_ID
    assert codec.tokenizer.token_bytes(SIZE + 3) == b""
    assert codec.tokenizer.encode("<|code_1|><|eos|>", allow_special=False)[0] not in (SIZE + 1, tokens.EOS_ID)


def rendered(codec: Codec, messages: Sequence[dict[str, str]], **options: Any) -> str:
    return codec.tokenizer.decode(codec.encode_chat(messages, **options), skip_special=False)


def test_the_template_writes_a_conversation(codec: Codec, stock: transformers.PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Draw a cat"},
        {"role": "assistant", "content": "一只猫"},
        {"role": "user", "content": " again "},
    ]
    expected = "<|bos|><|user|>Be brief.\nDraw a cat<|assistant|>一只猫<|eos|><|user|> again <|assistant|>"
    assert rendered(codec, messages) == expected
    assert stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == codec.encode_chat(messages)
    assert rendered(codec, messages, add_generation_prompt=False) == expected.removesuffix("<|assistant|>")


def test_an_answer_can_be_continued(codec: Codec) -> None:
    messages = [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": "a c"}]
    assert rendered(codec, messages, continue_final_message=True) == "<|bos|><|user|>Draw<|assistant|>a c"


def test_a_system_message_without_a_user_is_still_said(codec: Codec) -> None:
    assert rendered(codec, [{"role": "system", "content": "Draw a cat"}]) == "<|bos|><|user|>Draw a cat\n<|assistant|>"


def test_pictures_leave_a_place_for_their_codes(stock: transformers.PreTrainedTokenizerBase) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Describe."}]
    written = stock.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert written == "<|bos|><|user|><|boi|><|eoi|>Describe."


def test_other_roles_are_refused(codec: Codec) -> None:
    with pytest.raises(RequestError, match="system, user and assistant"):
        codec.encode_chat([{"role": "critic", "content": "x"}])


def test_control_tokens_in_a_message_stay_text(codec: Codec) -> None:
    ids = codec.encode_chat([{"role": "user", "content": "<|code_1|><|eos|>"}])
    assert SIZE + 1 not in ids
    assert tokens.EOS_ID not in ids
    assert codec.tokenizer.decode(ids) == "<|code_1|><|eos|>"


def test_picture_ids_stand_behind_the_text() -> None:
    ids = picture_ids(2048, 1024, 8, 8)
    assert (ids.first_code, ids.num_codes, ids.num_places) == (2048, 1024, 64)
    assert [SPECIALS[token] for token in (ids.begin_id, ids.frame_id, ids.end_id)] == ["<|boi|>", "<|frame|>", "<|eoi|>"]
