"""Tokenizers from what checkpoints carry: the metadata of a GGUF file, or tokenizer.json with tokenizer_config.json.

Reads no file itself and knows no template. Control tokens are taken out of what the library sees, so that no plain text, merge or
lookup can produce one; `special` finds them. Called by prompt.
Long, because two kinds of file and three of tokenizer end in one, under the same rules for control tokens.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from service.codec.special import Special, SpecialTokens
from service.codec.tokenizer import Ends, Tokenizer
from service.errors import StartupError

SPACE = "\u2581"  # how SentencePiece writes a space
# A piece longer than this is not split into merges, which costs the square of its length; it can still be decoded.
LONGEST_MERGED_PIECE = 512
# How each kind of model in tokenizer.json keeps its vocabulary.
_VOCAB_FORMS: dict[str, type] = {"BPE": dict, "WordPiece": dict, "Unigram": list}
# Names under which vocabularies keep an end of turn or of text that no metadata points at.
END_TEXTS = (
    *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<|endofturn|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>"),
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _TAIL
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|\p{{N}}{{1,3}}" + _TAIL


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a byte-level vocabulary cuts text into words before merging: patterns applied one after the other."""

    splits: tuple[str, ...]
    is_nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_DIGITS = _Recipe((r"\p{N}", _GPT2))
_LLAMA3_RECIPE = _Recipe((_LLAMA3,), ignores_merges=True, adds_bos=True)
_RECIPES: dict[str, _Recipe] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "exaone4"), _Recipe((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3_RECIPE),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _Recipe((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Recipe((_QWEN2,), is_nfc=True)),
    "stablelm2": _Recipe((_QWEN2,)),
    "tekken": _Recipe((_TEKKEN,), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Recipe((_GPT4O,))),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises: StartupError naming what is missing, unsupported or contradicts itself."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise StartupError("the GGUF file has no vocabulary (tokenizer.ggml.tokens)")
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise StartupError(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
    control = (TokenType.CONTROL, TokenType.UNKNOWN)
    special = SpecialTokens(Special(i, t) for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind in control and t)
    if model == "gpt2":
        library, is_byte_level, adds_bos = _byte_level_from_gguf(metadata, tokens, special.by_text), True, _recipe(metadata).adds_bos
    elif model == "llama":
        library, is_byte_level, adds_bos = _sentencepiece_from_gguf(metadata, tokens, types), False, True
    else:
        raise StartupError(f"the GGUF file's tokenizer is of kind {model!r}; supported are 'gpt2' (byte-level BPE) and 'llama'")
    own = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED and t]
    # SentencePiece looks for them behind normalisation, where a space and its sign are one. A prefixed space would get into them.
    is_normalized = model == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True)
    library.add_tokens([AddedToken(text, normalized=is_normalized) for text in own])
    pieces = _pieces(tokens, special, own, is_byte_level)
    return Tokenizer(pieces, special, _ends_from_gguf(metadata, special, len(tokens), adds_bos), library, library)


def tokenizer_from_json(data: Mapping[str, Any], config: Mapping[str, Any], eos_ids: Sequence[int]) -> Tokenizer:
    """data: tokenizer.json; config: tokenizer_config.json; eos_ids: what the model's other files say ends an answer.

    Raises: StartupError naming what is missing or unsupported.
    """
    kind = _kind(data)
    try:
        added = [token for token in data.get("added_tokens") or [] if token["content"]]
        control = [token for token in added if token.get("special")]
        special = SpecialTokens(
            Special(t["id"], t["content"], bool(t.get("lstrip")), bool(t.get("rstrip"))) for t in control if _is_id(t["id"])
        )
        texts = _texts_by_id(_vocab(data["model"]), added)
        own = [token["content"] for token in added if not token.get("special")]
        bos_id, closing_id = _around(data, special)
        first, rest = _without_special(data, special.by_text)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StartupError(f"tokenizer.json is not of the expected form: {error}") from error
    if kind == "WordPiece":
        pieces = _word_pieces(texts, special, own, str(data["model"].get("continuing_subword_prefix", "##")))
    else:
        pieces = _pieces(texts, special, own, _is_byte_level(data))
    says = config.get("add_bos_token")
    add_bos = bos_id is not None if says is None else bool(says)
    bos = special.by_text.get(token_text(config.get("bos_token")))
    bos_id = bos.id if bos else bos_id
    named = [*eos_ids, *_ids_of(special, token_text(config.get("eos_token")))]
    ends = Ends(bos_id, _eos_ids(named, special, len(texts)), add_bos and bos_id is not None, closing_id)
    return Tokenizer(pieces, special, ends, first, rest)


def _kind(data: Mapping[str, Any]) -> str:
    """Raises: StartupError for a tokenizer that is not built here."""
    model = data.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind not in _VOCAB_FORMS or not isinstance(data["model"].get("vocab"), _VOCAB_FORMS[kind]):
        raise StartupError(f"tokenizer.json must hold a model of kind {', '.join(_VOCAB_FORMS)}; other kinds are not supported")
    if kind == "Unigram" and '"Metaspace"' not in json.dumps(data.get("pre_tokenizer")):
        raise StartupError("tokenizer.json holds a Unigram model that does not mark spaces (Metaspace), which is not supported")
    return str(kind)


def _vocab(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text, in either form of the file: an object, or Unigram's list of text and score."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {text: index for index, (text, _) in enumerate(vocab)}


def token_text(value: Any) -> str:
    """A token as tokenizer_config.json writes it, a string or an object with content; empty when there is none."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _recipe(metadata: Mapping[str, Any]) -> _Recipe:
    name = metadata.get("tokenizer.ggml.pre", "default")
    recipe = _RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        raise StartupError(f"the GGUF file's pre-tokenizer {name!r} is not supported; known are {', '.join(sorted(_RECIPES))}")
    return recipe


def _byte_level_from_gguf(metadata: Mapping[str, Any], tokens: Sequence[str], special: Collection[str]) -> tokenizers.Tokenizer:
    recipe = _recipe(metadata)
    vocab = {text: index for index, text in enumerate(tokens) if text not in special}
    lines = metadata.get("tokenizer.ggml.merges")
    if not lines or not all(isinstance(line, str) for line in lines):
        raise StartupError("the GGUF file has no merges (tokenizer.ggml.merges)")
    # The space that parts the two halves is never the first character.
    merges = [(line[:cut], line[cut + 1 :]) for line in lines if (cut := line.find(" ", 1)) > 0]
    library = _bpe(vocab, _without(merges, special), ignore_merges=recipe.ignores_merges)
    if recipe.is_nfc:
        library.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in recipe.splits]
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return library


def _sentencepiece_from_gguf(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens) or not all(math.isfinite(score) for score in scores):
        raise StartupError("the GGUF file has no usable scores (tokenizer.ggml.scores), one number for each token")
    kept = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.BYTE, TokenType.UNKNOWN)
    vocab = {text: index for index, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind in kept}
    merged = {text: index for text, index in vocab.items() if types[index] in (TokenType.NORMAL, TokenType.USER_DEFINED)}
    unknown = next((text for text, index in vocab.items() if types[index] == TokenType.UNKNOWN), None)
    library = _bpe(vocab, _merges_by_score(merged, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
    library.normalizer = normalizers.Sequence(spaces)
    return library


def _merges_by_score(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest; as merges, that is every way to make a piece, by its score."""
    found = []
    for text, index in vocab.items():
        if len(text) > LONGEST_MERGED_PIECE:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[index], index, vocab[left], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"the model's vocabulary and merges don't fit together: {error}") from error


def _without(merges: Sequence[Sequence[str]], special: Collection[str]) -> list[tuple[str, str]]:
    """Merges that neither use nor make a special token."""
    return [(a, b) for a, b in merges if a not in special and b not in special and a + b not in special]


def _without_special(data: Mapping[str, Any], special: Collection[str]) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """The library's tokenizers for the start of a text and for the rest of it, which differ where a space is prepended once only."""
    plain = {key: value for key, value in data.items() if key not in ("post_processor", "truncation", "padding")}
    added = [token for token in data.get("added_tokens") or [] if token["content"] not in special]
    plain["model"] = _model_without(data["model"], special, added)
    plain["added_tokens"] = added
    first = _from_json(plain)
    rest = copy.deepcopy(plain.get("pre_tokenizer"))
    if not _set_prepend_never(rest):
        return first, first
    return first, _from_json({**plain, "pre_tokenizer": rest})


def _model_without(given: Mapping[str, Any], special: Collection[str], added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    model = dict(given)
    if isinstance(model["vocab"], list):
        # Ids are places in the list, so a special token stays in its place under a text with a space, of which no text has any left.
        model["vocab"] = [[f"{index} " if text in special else text, score] for index, (text, score) in enumerate(model["vocab"])]
        return model
    unknown = model.get("unk_token")
    vocab = {text: index for text, index in model["vocab"].items() if text not in special or text == unknown}
    # The library numbers an added token that its model does not know by itself, whatever the file says.
    model["vocab"] = vocab | {token["content"]: token["id"] for token in added}
    if model.get("type", "BPE") == "BPE":
        model["merges"] = _without([m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []], special)
    return model


def _set_prepend_never(part: Any) -> bool:
    """Whether a pre-tokenizer prepends a space to a text's start alone; if so it won't any more. Mutates: part."""
    if not isinstance(part, dict):
        return False
    if part.get("type") == "Sequence":
        changed = [_set_prepend_never(child) for child in part.get("pretokenizers") or []]
        return any(changed)
    if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
        part["prepend_scheme"] = "never"
        return True
    return False


def _from_json(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    except Exception as error:  # the library raises nothing narrower
        raise StartupError(f"tokenizer.json can't be used: {error}") from error


def _around(data: Mapping[str, Any], special: SpecialTokens) -> tuple[int | None, int | None]:
    """The special tokens that the file's own post-processing puts before and after every text; a letter shows them."""
    if data.get("post_processor") is None:
        return None, None
    library = _from_json({**data, "truncation": None, "padding": None})
    whole, bare = library.encode("a").ids, library.encode("a", add_special_tokens=False).ids
    start = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
    before, after = whole[:start], whole[start + len(bare) :]
    return (
        before[0] if before and before[0] in special.ids else None,
        after[-1] if after and after[-1] in special.ids else None,
    )


def _texts_by_id(vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> list[str]:
    by_id = {index: text for text, index in vocab.items()} | {token["id"]: token["content"] for token in added}
    if not by_id or not all(_is_id(index) for index in by_id) or max(by_id) > 2 * len(by_id) + (1 << 16):
        raise StartupError("tokenizer.json has no vocabulary, or ids that are not small whole numbers")
    return [by_id.get(index, "") for index in range(max(by_id) + 1)]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    """Raises: StartupError when the pieces are spelled neither in byte-level letters nor as SentencePiece does."""
    parts = json.dumps([data.get("decoder"), data.get("pre_tokenizer"), data.get("normalizer")])
    if '"ByteLevel"' in parts:
        return True
    if data["model"].get("byte_fallback") or '"Metaspace"' in parts or json.dumps(SPACE) in parts:
        return False
    raise StartupError("tokenizer.json is neither byte-level nor of SentencePiece's kind")


def _pieces(tokens: Sequence[str], special: SpecialTokens, own: Collection[str], is_byte_level: bool) -> list[bytes]:
    """Each id's bytes: nothing for special tokens, the text itself for added ones, and the vocabulary's own spelling undone."""
    letters = _byte_letters()
    as_is = set(own)

    def piece(index: int, text: str) -> bytes:
        if index in special.ids:
            return b""
        if text in as_is:
            return text.encode("utf-8", "replace")
        if is_byte_level:
            known = [letters.get(char) for char in text]
            return text.encode("utf-8", "replace") if None in known else bytes(byte for byte in known if byte is not None)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace(SPACE, " ").encode("utf-8", "replace")

    try:
        return [piece(index, text) for index, text in enumerate(tokens)]
    except ValueError as error:
        raise StartupError(f"the vocabulary has a byte token that names no byte: {error}") from error


def _word_pieces(tokens: Sequence[str], special: SpecialTokens, own: Collection[str], prefix: str) -> list[bytes]:
    """Each id's bytes: a word begins with a space, a piece with the prefix goes on without one. What normalisation took stays lost."""
    as_is = set(own)

    def piece(index: int, text: str) -> bytes:
        if index in special.ids or not text:
            return b""
        if text in as_is:
            return text.encode("utf-8", "replace")
        spelled = text.removeprefix(prefix) if text.startswith(prefix) and text != prefix else f" {text}"
        return spelled.encode("utf-8", "replace")

    return [piece(index, text) for index, text in enumerate(tokens)]


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies spell bytes: printable Latin-1 as itself, the rest moved up from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(moved)}


def _ends_from_gguf(metadata: Mapping[str, Any], special: SpecialTokens, vocab_size: int, adds_bos: bool) -> Ends:
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and not (_is_id(bos) and bos < vocab_size):
        raise StartupError(f"the beginning of sequence is token {bos}, which is not in the vocabulary of {vocab_size}")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    return Ends(bos, _eos_ids([token for token in named if token is not None], special, vocab_size), add_bos and bos is not None)


def _eos_ids(named: Sequence[Any], special: SpecialTokens, vocab_size: int) -> tuple[int, ...]:
    """What ends an answer, in order of naming: what the files point at, then special tokens whose text says so."""
    for token in named:
        if not (_is_id(token) and token < vocab_size):
            raise StartupError(f"the end of sequence is token {token}, which is not in the vocabulary of {vocab_size}")
    return tuple(dict.fromkeys([*named, *(token for text in END_TEXTS for token in _ids_of(special, text))]))


def _ids_of(special: SpecialTokens, text: str) -> list[int]:
    return [special.by_text[text].id] if text in special.by_text else []
