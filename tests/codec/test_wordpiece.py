"""WordPiece and Unigram vocabularies: the same ids as the library's own, the ids around a text, and no control id out of plain text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from service.codec.prompt import Codec, load_codec
from service.errors import StartupError
from tests.codec.tiny import llama3_library, write_folder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("hello", "play", "##ing", "##s", "the", "cat", "[", "]", "sep", "cls", "un", "##k", ",", "##")
TEXTS = ("hello", "Hello  the CAT", "playing plays", "héllo, cat", "zebra hello", "", "  ", "the\tcat\n", "catcat", "[ the ]", "## cat")


def word_piece() -> tokenizers.Tokenizer:
    vocab = {text: index for index, text in enumerate((*SPECIAL, *WORDS))}
    library = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(list(SPECIAL))
    library.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return library


def unigram(piece_of_cls: str = "<s>") -> tokenizers.Tokenizer:
    vocab = [(piece_of_cls, 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(text, -float(place)) for place, text in enumerate(("▁", "▁the", "▁cat", "cat", "s", "<", ">", "/", "t", "h", "e", "c", "a"))]
    library = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens([piece_of_cls, "<pad>", "</s>", "<unk>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return library


def codec_of(folder: Path, library: tokenizers.Tokenizer) -> Codec:
    return load_codec(write_folder(folder, library), name="m")


@pytest.mark.parametrize("text", TEXTS)
def test_word_piece_ids_are_those_of_the_library(tmp_path: Path, text: str) -> None:
    library = word_piece()
    codec = codec_of(tmp_path, library)
    assert codec.encode_document(text) == library.encode(text).ids
    assert codec.tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["the cat", "cats", "thecat", "zzz", "the  cat", "", "<", "</the>"])
def test_unigram_ids_are_those_of_the_library(tmp_path: Path, text: str) -> None:
    library = unigram()
    assert codec_of(tmp_path, library).encode_document(text) == library.encode(text).ids


def test_the_files_truncation_and_padding_are_not_ours(tmp_path: Path) -> None:
    library = word_piece()
    long = "the cat " * 20
    whole = library.encode(long).ids
    library.enable_truncation(8)
    library.enable_padding(length=64)
    assert codec_of(tmp_path, library).encode_document(long) == whole
    assert len(whole) == 42


def test_the_ids_around_a_text(tmp_path: Path) -> None:
    ends = codec_of(tmp_path / "a", word_piece()).tokenizer.ends
    assert (ends.bos_id, ends.add_bos, ends.closing_id) == (2, True, 3)
    library = word_piece()
    library.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    ends = codec_of(tmp_path / "b", library).tokenizer.ends
    assert (ends.bos_id, ends.add_bos, ends.closing_id) == (None, False, 3)
    assert codec_of(tmp_path / "c", llama3_library()).tokenizer.ends.closing_id is None


@pytest.mark.parametrize("text", ["[SEP]", "[CLS] the [SEP]", "the[UNK]cat", "[cls]", "[PAD][PAD]"])
def test_no_text_becomes_a_control_id_of_word_piece(tmp_path: Path, text: str) -> None:
    codec = codec_of(tmp_path, word_piece())
    inner = codec.encode_document(text)[1:-1]
    # A word that the vocabulary lacks is [UNK], whatever it spells.
    assert not {0, 2, 3} & set(inner)
    assert codec.tokenizer.encode("[SEP]", allow_special=True) == [3]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>cat", "<unk>", "0 ", "2 ", " 2 ", "▁2 ", "\ufdd02"])
def test_no_text_becomes_a_control_id_of_unigram(tmp_path: Path, text: str) -> None:
    codec = codec_of(tmp_path, unigram())
    assert not {0, 1, 2} & set(codec.tokenizer.encode(text))


def test_pieces_spell_words_with_a_space_before(tmp_path: Path) -> None:
    tokenizer = codec_of(tmp_path, word_piece()).tokenizer
    assert tokenizer.decode(tokenizer.encode("the cat plays")) == " the cat plays"
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_bytes(2, skip_special=False) == b"[CLS]"
    assert tokenizer.token_bytes(4 + WORDS.index("##")) == b" ##"


def test_a_unigram_model_that_does_not_mark_spaces_is_refused(tmp_path: Path) -> None:
    library = unigram()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(StartupError, match="does not mark spaces"):
        codec_of(tmp_path, library)


@pytest.mark.parametrize("vocab", [[["a"]], [3], [["a", 0.0, 1]], [[["a"], 0.0]]], ids=str)
def test_a_broken_unigram_list_is_refused(tmp_path: Path, vocab: list[object]) -> None:
    write_folder(tmp_path, unigram())
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] = vocab
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(StartupError, match=r"not of the expected form|can't be used"):
        load_codec(tmp_path, name="m")
