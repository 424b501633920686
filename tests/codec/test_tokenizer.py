"""Ids of both kinds of vocabulary: equal to what the reference gives, and every text comes back."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from service.checkpoint import open_gguf
from service.codec.prompt import load_codec
from service.codec.tokenizer import Tokenizer
from service.codec.tokenizer_files import tokenizer_from_gguf
from service.errors import StartupError
from tests.codec.tiny import CONTROL, byte_level_metadata, letters, llama2_library, llama3_library, sentencepiece_metadata, write_folder

UNICODE = st.text()
BYTE_LEVEL = tokenizer_from_gguf(byte_level_metadata())
SENTENCEPIECE = tokenizer_from_gguf(sentencepiece_metadata())
SAMPLES = [
    "a\x04b \U00040000",
    "Hello, we can use",
    "  multiple   spaces",
    "日本語 text ñ \r\n\r\n x",
    "def f(x):\n    return x\n\n",
    "I'll say it's",
    "😀👍🏽 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x07\u200b\ufeff",
]


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return tokenizer_from_gguf(open_gguf(smollm2_path, with_tokens=True).metadata)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As the model's published tokenizer has them: digits one by one, an accent in two pieces, spaces before a word.
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("", []),
    ],
)
def test_the_default_model_has_its_published_ids(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == text


def test_the_default_model_agrees_with_transformers(smollm2: Tokenizer, reference: transformers.PreTrainedTokenizerBase) -> None:
    for text in SAMPLES:  # without digits, which transformers does not part when it reads a GGUF file
        ids = smollm2.encode(text, allow_special=True)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert smollm2.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(UNICODE)
def test_byte_level_text_comes_back_and_holds_no_control_id(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.decode(ids) == text
    assert not BYTE_LEVEL.special.ids.intersection(ids)


@given(UNICODE)
def test_the_default_model_brings_every_text_back_but_for_bytes_it_has_no_letter_for(smollm2: Tokenizer, text: str) -> None:
    lost = b"\x04\x06\x13\x14\x16\x1d\xf1\xf2"  # in the model's vocabulary no token has them
    assert smollm2.decode(smollm2.encode(text)) == text.encode().translate(None, lost).decode("utf-8", "replace")


@given(st.text() | st.text("helo \u2581"))
def test_sentencepiece_text_comes_back_after_its_added_space(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    assert SENTENCEPIECE.decode(ids) == (" " + text if text else "").replace("\u2581", " ")
    assert not SENTENCEPIECE.special.ids.intersection(ids)


@given(st.lists(st.sampled_from([*CONTROL, "a", " ", "hello", "<own>"])).map("".join))
def test_special_texts_are_control_ids_only_when_allowed(text: str) -> None:
    plain = BYTE_LEVEL.encode(text)
    assert not BYTE_LEVEL.special.ids.intersection(plain)
    assert BYTE_LEVEL.decode(plain) == text
    meant = BYTE_LEVEL.encode(text, allow_special=True)
    assert sum(token in BYTE_LEVEL.special.ids for token in meant) == sum(text.count(special) for special in CONTROL)
    assert BYTE_LEVEL.decode(meant, skip_special=False) == text


@pytest.mark.parametrize("text", CONTROL)
def test_every_special_text_of_the_default_model_can_be_plain(smollm2: Tokenizer, text: str) -> None:
    assert not smollm2.special.ids.intersection(smollm2.encode(text))
    assert len(smollm2.encode(text, allow_special=True)) == 1


def test_a_token_of_the_models_own_is_found_in_plain_text() -> None:
    own = byte_level_metadata()["tokenizer.ggml.tokens"].index("<own>")
    assert own in BYTE_LEVEL.encode("a<own>b")
    assert BYTE_LEVEL.token_bytes(own) == b"<own>"


def test_bytes_of_tokens() -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    for byte, letter in enumerate(letters()):
        assert BYTE_LEVEL.token_bytes(tokens.index(letter)) == bytes([byte])
        assert SENTENCEPIECE.token_bytes(3 + byte) == bytes([byte])
    assert BYTE_LEVEL.token_bytes(tokens.index("Ġhello")) == b" hello"
    assert SENTENCEPIECE.token_bytes(sentencepiece_metadata()["tokenizer.ggml.tokens"].index("\u2581hello")) == b" hello"
    assert BYTE_LEVEL.token_bytes(1) == b""
    assert BYTE_LEVEL.token_bytes(1, skip_special=False) == b"<|im_start|>"
    assert BYTE_LEVEL.token_bytes(10**6) == BYTE_LEVEL.token_bytes(-1) == b""


def test_other_threads_go_on_while_a_long_text_is_encoded(smollm2: Tokenizer) -> None:
    done = threading.Event()
    ids: list[int] = []

    def encode() -> None:
        ids.extend(smollm2.encode("the quick brown fox " * 20_000))
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    num_turns = 0
    while not done.is_set():
        num_turns += 1
        time.sleep(0.005)
    thread.join()
    # It takes some 100 ms; under the interpreter's lock there would be one turn before it and one after it.
    assert len(ids) > 80_000 - 1
    assert num_turns > 5


def test_half_a_surrogate_pair_is_refused() -> None:
    for allow in (False, True):
        with pytest.raises(UnicodeEncodeError):
            BYTE_LEVEL.encode("a\ud800b", allow_special=allow)


def test_own_tokens_of_spaces_are_found_where_text_has_spaces_or_their_sign() -> None:
    """As Gemma has them: runs of spaces, stored as such, in a vocabulary that prefixes none."""
    plain = sentencepiece_metadata()
    metadata = sentencepiece_metadata(
        **{
            "tokenizer.ggml.tokens": [*plain["tokenizer.ggml.tokens"], "  ", "   ", "\n\n"],
            "tokenizer.ggml.scores": [*plain["tokenizer.ggml.scores"], -1000.0, -1000.0, -1000.0],
            "tokenizer.ggml.token_type": [*plain["tokenizer.ggml.token_type"], 4, 4, 4],
            "tokenizer.ggml.add_space_prefix": False,
        }
    )
    gemma = tokenizer_from_gguf(metadata)
    ids = {text: index for index, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert gemma.encode("hello  hello") == [ids["hello"], ids["  "], ids["hello"]]
    assert gemma.encode("   he\n\nhello h") == [ids["   "], ids["he"], ids["\n\n"], ids["hello"], ids["\u2581h"]]
    assert gemma.encode("he \u2581 h") == [ids["he"], ids["   "], ids["h"]], "SentencePiece knows no difference"
    assert gemma.decode(gemma.encode("  hello\n\n   h")) == "  hello\n\n   h"


def test_sentencepiece_ids_equal_those_of_the_equivalent_library_tokenizer() -> None:
    legacy = llama2_library("legacy")
    for text in ["hello", "hello hello", " hello", "he ll", "é", "x hello\nhe", "hhell"]:
        assert SENTENCEPIECE.encode(text) == legacy.encode(text, add_special_tokens=False).ids
    # SentencePiece marks a space after every special token; so does the library.
    text = "hello</s>hello"
    assert SENTENCEPIECE.encode(text, allow_special=True) == legacy.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 1234 it's  x", ["a", " 1234", " it", "'s", " ", " x"]),
        ("smollm", "ab 1234", ["ab", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "a 12345 IT'S(x)\n\n y", ["a", " ", "123", "45", " IT", "'S", "(x", ")\n\n", " y"]),
        ("qwen2", "a 12 IT'S", ["a", " ", "1", "2", " IT", "'S"]),
        ("tekken", "HelloWorld 12 it's", ["Hello", "World", " ", "1", "2", " it", "'s"]),
        ("gpt-4o", "HelloWorld 1234 it's", ["Hello", "World", " ", "123", "4", " it's"]),
    ],
)
def test_words_are_cut_as_the_named_pre_tokenizer_does(pre: str, text: str, words: list[str]) -> None:
    # Merges that join everything inside a word, and a vocabulary of those words: one id per word shows where text was cut.
    spelled = [word.replace(" ", "Ġ").replace("\n", "Ċ") for word in words]
    joined = dict.fromkeys(word[:end] for word in spelled for end in range(2, len(word) + 1))
    merges = [f"{prefix[:-1]} {prefix[-1]}" for prefix in joined]
    tokens = [*CONTROL, *letters(), *joined]
    changes: dict[str, Any] = {"tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3), "merges": merges, "pre": pre}
    tokenizer = tokenizer_from_gguf(byte_level_metadata(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()}))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == words


def test_composition_is_normalised_where_the_model_wants_it() -> None:
    qwen = tokenizer_from_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": "qwen2"}))
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("e\u0301")) == "e\u0301"


def test_ends_come_from_the_metadata_and_from_telling_texts() -> None:
    assert BYTE_LEVEL.ends.eos_ids == (2, 0)
    assert (BYTE_LEVEL.ends.bos_id, BYTE_LEVEL.ends.add_bos) == (1, False)
    assert SENTENCEPIECE.ends.add_bos
    assert tokenizer_from_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": "llama-bpe"})).ends.add_bos
    assert not tokenizer_from_gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_bos_token": False})).ends.add_bos


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (byte_level_metadata(**{"tokenizer.ggml.pre": "martian"}), "'martian'"),
        (byte_level_metadata(**{"tokenizer.ggml.model": "bert"}), "'bert'"),
        (byte_level_metadata(**{"tokenizer.ggml.tokens": None}), "no vocabulary"),
        (byte_level_metadata(**{"tokenizer.ggml.tokens": [1, 2]}), "no vocabulary"),
        (byte_level_metadata(**{"tokenizer.ggml.token_type": [1]}), "token types"),
        (byte_level_metadata(**{"tokenizer.ggml.merges": None}), "no merges"),
        (byte_level_metadata(**{"tokenizer.ggml.merges": ["z zz"]}), "don't fit together"),
        (byte_level_metadata(**{"tokenizer.ggml.eos_token_id": 99999}), "end of sequence is token 99999"),
        (byte_level_metadata(**{"tokenizer.ggml.bos_token_id": -1}), "beginning of sequence is token -1"),
        (sentencepiece_metadata(**{"tokenizer.ggml.scores": None}), "no usable scores"),
        (sentencepiece_metadata(**{"tokenizer.ggml.scores": [float("nan")] * 271}), "no usable scores"),
    ],
)
def test_what_a_gguf_vocabulary_lacks_is_named(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        tokenizer_from_gguf(metadata)


def folder_tokenizer(folder: Path, library: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    return load_codec(write_folder(folder, library, tokenizer_config=config)).tokenizer


@pytest.mark.parametrize("library", [llama3_library(), *map(llama2_library, ("legacy", "first", "always", "never"))])
def test_a_folders_tokenizer_agrees_with_transformers(tmp_path: Path, library: tokenizers.Tokenizer) -> None:
    ours = folder_tokenizer(tmp_path, library)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [
        *SAMPLES,
        "hello hello",
        " hello",
        "hello<|eot|>hello<|begin|> hello",
        "hello</s>hello</s> hello",
        "<s> hello",
        "<think>a",
    ]:
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_folders_special_tokens_take_their_spaces_and_stay_out_of_plain_text(tmp_path: Path) -> None:
    library = llama3_library()
    ours = folder_tokenizer(tmp_path, library)
    text = "hello<|right|> \n hello"
    assert ours.encode(text, allow_special=True) == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode("a<|right|> b", allow_special=True)) == "ab"
    plain = ours.encode("<|begin|> <|eot|> <think>")
    assert not ours.special.ids.intersection(plain)
    assert library.token_to_id("<think>") in plain
    assert ours.decode(plain) == "<|begin|> <|eot|> <think>"


def test_a_folder_says_whether_prompts_begin_with_a_token(tmp_path: Path) -> None:
    begin = llama3_library().token_to_id("<|begin|>")
    by_post_processor = folder_tokenizer(tmp_path / "a", llama3_library())
    assert (by_post_processor.ends.bos_id, by_post_processor.ends.add_bos) == (begin, True)
    by_config = folder_tokenizer(tmp_path / "b", llama2_library("legacy"), bos_token={"content": "<s>"}, add_bos_token=True)
    assert (by_config.ends.bos_id, by_config.ends.add_bos) == (1, True)
    assert not folder_tokenizer(tmp_path / "c", llama2_library("legacy"), bos_token="<s>").ends.add_bos
    assert not folder_tokenizer(tmp_path / "d", llama3_library(), bos_token="<|begin|>", add_bos_token=False).ends.add_bos


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model": {"type": "WordLevel", "vocab": {}}}', "must hold a model of kind BPE, WordPiece, Unigram"),
        ('{"model": {"type": "BPE", "vocab": []}}', "must hold a model of kind"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "does not mark spaces"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "neither byte-level"),
        ('{"model": {"type": "BPE", "vocab": {"a": 2000000000}, "merges": []}}', "small whole numbers"),
        ('{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}', "can't be used|small whole numbers"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [3]}', "not of the expected form"),
    ],
)
def test_a_tokenizer_json_that_does_not_fit_is_refused(tmp_path: Path, content: str, words: str) -> None:
    write_folder(tmp_path, llama3_library())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=words):
        load_codec(tmp_path)
