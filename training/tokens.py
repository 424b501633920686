"""The vocabulary of braid's own models: special tokens, then byte-level BPE trained here, then a token for every image code.

Writes the files that servers and other libraries read; encodes nothing in serving. Called by the recipes and by export.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from service.vocabulary import PictureIds

PAD, BOS, EOS, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
BEGIN_IMAGE, FRAME, END_IMAGE = "<|boi|>", "<|frame|>", "<|eoi|>"
_NAMED = (PAD, BOS, EOS, USER, ASSISTANT, BEGIN_IMAGE, FRAME, END_IMAGE)
# A special token's id is its place here, whatever the vocabulary behind it.
SPECIALS = (*_NAMED, *(f"<|reserved_{index}|>" for index in range(16 - len(_NAMED))))
PAD_ID, BOS_ID, EOS_ID, USER_ID, ASSISTANT_ID, BEGIN_IMAGE_ID, FRAME_ID, END_IMAGE_ID = range(len(_NAMED))

# Merges stay inside these pieces. A word may take the space before it, a digit too. Chinese characters stand alone: without spaces a
# phrase like "a big red star" would become one token, and a model could not learn that its parts go with other parts.
_PIECES = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)",
        r" ?[\p{L}\p{M}&&[^\p{Han}]]+",
        r"\p{Han}",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# What a system says goes in front of the user's next message. A picture's codes are put between its two tokens once they are known.
CHAT_TEMPLATE = """\
{%- macro written(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}
            {%- if part.type == 'image' -%}
                {{- '<|boi|><|eoi|>' -}}
            {%- elif part.text is defined -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set said = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set said.system = said.system + written(message.content) + '\\n' -%}
    {%- elif message.role == 'user' -%}
        {{- '<|user|>' + said.system + written(message.content) -}}
        {%- set said.system = '' -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|assistant|>' + written(message.content) + '<|eos|>' -}}
    {%- else -%}
        {{- raise_exception('messages are of the roles system, user and assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if said.system -%}
    {{- '<|user|>' + said.system -}}
{%- endif -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], text_vocab_size: int, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """Byte-level BPE of exactly text_vocab_size ids: the special tokens, the 256 bytes, then merges. Any text survives both ways.

    Raises: ValueError when the size has no room for the bytes, or the texts are too few for so many merges.
    """
    if text_vocab_size < len(specials) + 256:
        raise ValueError(f"a vocabulary of {text_vocab_size} has no room for {len(specials)} special tokens and 256 bytes")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != text_vocab_size:
        raise ValueError(f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {text_vocab_size}: give more text")
    return tokenizer


def picture_ids(text_vocab_size: int, num_codes: int, rows: int, columns: int) -> PictureIds:
    """Where the codes stand in the ids: right behind the text's."""
    return PictureIds(text_vocab_size, num_codes, rows, columns, BEGIN_IMAGE_ID, FRAME_ID, END_IMAGE_ID)


def with_codes(tokenizer: tokenizers.Tokenizer, num_codes: int) -> tokenizers.Tokenizer:
    """A copy that also knows the image codes, as special tokens behind the text's, and that begins a text with <|bos|>."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens([f"<|code_{code}|>" for code in range(num_codes)])
    copy.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)])
    return copy


def export_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, num_codes: int, max_len: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json for a model of max_len ids of context.

    tokenizer: of `train_tokenizer` with SPECIALS. Mutates: the folder.
    """
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        **roles,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    with_codes(tokenizer, num_codes).save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", roles)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
