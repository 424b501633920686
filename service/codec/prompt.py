"""Prompts into ids: a conversation through the model's template, or raw text. Special tokens come from the template alone.

`load_codec` reads everything a model's files say about text, without the weights. Called by the API; knows no HTTP and no device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from service.checkpoint import find_checkpoint, open_gguf, read_json
from service.codec.conversation import calls_in_words, template_messages, told
from service.codec.reply_format import ReplyFormat, reply_format
from service.codec.special import MARKERS
from service.codec.template import ChatTemplate
from service.codec.tokenizer import Tokenizer
from service.codec.tokenizer_files import token_text, tokenizer_from_gguf, tokenizer_from_json
from service.codec.tools import ToolSet, tools_in_words
from service.errors import RequestError, StartupError, WeightsError
from service.vocabulary import PictureIds

# Sampling defaults that a model may bring: our name, GGUF's name, least, most.
_DEFAULTS = (
    ("temperature", "temp", 0.0, 2.0),
    ("top_p", "top_p", 0.0, 1.0),
    ("top_k", "top_k", 0.0, 2.0**31 - 1),
    ("min_p", "min_p", 0.0, 1.0),
    ("repetition_penalty", "penalty_repeat", 0.01, 100.0),
    ("guidance_scale", "guidance_scale", 0.0, 20.0),
)
_USUAL_CONTEXT = {"gemma3_text": 131_072}  # of kinds of models whose published configs leave it out
CAPTION_QUESTIONS = ("What is this?", "Describe the picture.")
"""How a model is asked for a picture's caption, unless its generation_config.json says otherwise."""


@dataclass(frozen=True, slots=True)
class Codec:
    """Everything about one model's text. template None: the model has none and can't chat. sampling_defaults: SamplingParams' names,
    those that the model's files set, and the guidance_scale of drawings. pictures: which ids are codes, where it has any.
    caption_questions: what it was taught to answer with a picture's caption. format: how the model answers."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: Mapping[str, float | int]
    max_context: int
    pictures: PictureIds | None = None
    caption_questions: tuple[str, ...] = CAPTION_QUESTIONS
    format: ReplyFormat = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", reply_format(self.template, self.tokenizer))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.ends.eos_ids

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: ToolSet | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: str | None = None,
        pictures: Sequence[Sequence[int]] = (),
    ) -> list[int]:
        """Ids of a conversation. Text inside messages and tools that spells a special token is plain text. pictures: the codes of every
        part of the type image, in order.

        continue_final_message: the prompt ends inside the last message, the assistant's, whatever add_generation_prompt says.
        template_kwargs: the template's own variables; they go before what reasoning_effort means to it.

        Raises: RequestError when there is no template, when it refuses, takes too long or has no such variable, or when a text has half
        a surrogate pair.
        """
        if self.template is None:
            raise RequestError(f"the model {self.name} has no chat template; use /v1/completions", param="messages")
        template = self.template
        given = {**template.effort_variables(reasoning_effort), **template.checked_variables(template_kwargs or {})}
        offered = [tool.as_template_input() for tool in tools.tools] if tools else []
        plain = self._template_messages(template, messages, offered)
        known_tools = offered if offered and self.format.knows_tools else None
        marker, seal = _free_markers(template.source, plain, given, known_tools)
        special = self.tokenizer.special

        def protect(text: str) -> str:
            return special.protect(text, marker)

        safe = [_mapped_message(message, protect) for message in plain]
        if continue_final_message:
            if not messages or messages[-1].get("role") != "assistant" or messages[-1].get("tool_calls"):
                param = "continue_final_message"
                raise RequestError("continue_final_message needs a last message of the assistant without calls", param=param)
            safe[-1]["content"] += seal
        variables = {key: _mapped(value, protect) for key, value in given.items()}
        variables["tools"] = _mapped(known_tools, protect)
        variables["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        rendered = template.render(safe, variables)
        if continue_final_message:
            rendered = _cut_at(seal, rendered)
        try:
            ids = self.tokenizer.encode_prompt(rendered, marker)
        except UnicodeEncodeError:
            raise RequestError("messages hold half a surrogate pair, which is no character", param="messages") from None
        return place_pictures(ids, pictures, self.pictures) if self.pictures is not None and pictures else ids

    def _template_messages(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        plain = template_messages(messages, wants_none=template.wants_none, has_short_ids=self.format.dialect.has_short_ids)
        if not template.knows_calls and not self.format.knows_tools:
            plain = calls_in_words(plain)
        if tools and not self.format.knows_tools:
            plain = told(plain, tools_in_words(tools), has_system=self.format.knows_system)
        return plain

    def encode_text(self, prompt: str) -> list[int]:
        """Ids of a raw prompt, whose special tokens are meant, with the beginning of sequence if the model wants one.

        Raises: RequestError when the text has half a surrogate pair.
        """
        try:
            ids = self.tokenizer.encode(prompt, allow_special=True)
        except UnicodeEncodeError:
            raise RequestError("prompt holds half a surrogate pair, which is no character", param="prompt") from None
        ends = self.tokenizer.ends
        if ends.add_bos and ends.bos_id is not None and ids[:1] != [ends.bos_id]:
            ids.insert(0, ends.bos_id)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text that is read for its vector, between the ids that the model wants around it. Special tokens in it are plain text.

        Raises: ValueError when the text has half a surrogate pair.
        """
        ids = self.tokenizer.encode(text)
        ends = self.tokenizer.ends
        before = [ends.bos_id] if ends.add_bos and ends.bos_id is not None else []
        return [*before, *ids, *([ends.closing_id] if ends.closing_id is not None else [])]

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises: RequestError naming the first id that is not in the vocabulary."""
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                message = f"prompt has the id {token} at position {index}; the vocabulary has ids 0 to {self.vocab_size - 1}"
                raise RequestError(message, param="prompt")


def place_pictures(ids: Sequence[int], pictures: Sequence[Sequence[int]], marks: PictureIds) -> list[int]:
    """Codes between the begin and end ids that the template wrote for each picture. Pictures that follow each other become the frames of a
    film, as the model was taught. Raises: RequestError when the template did not write all of them."""
    found: list[int] = []
    left = iter(pictures)
    count = 0
    for place, token in enumerate(ids):
        if token == marks.begin_id and ids[place + 1 : place + 2] == [marks.end_id]:
            codes = next(left, None)
            count += codes is not None
            if found and found[-1] == marks.end_id:
                found[-1] = marks.frame_id
            else:
                found.append(token)
            found += codes or ()
        else:
            found.append(token)
    if count != len(pictures):
        raise RequestError("the model's chat template does not write all pictures of the messages", param="messages")
    return found


def load_codec(path: Path | str, *, name: str | None = None) -> Codec:
    """The codec of a `.gguf` file or of a folder with tokenizer.json; name defaults to the file's or folder's own.

    Raises: StartupError or WeightsError saying what is missing or wrong.
    """
    checkpoint = find_checkpoint(Path(path))
    name = name or (checkpoint.path.stem if checkpoint.kind == "gguf" else checkpoint.path.resolve().name)
    return _codec_from_gguf(checkpoint.path, name) if checkpoint.kind == "gguf" else _codec_from_folder(checkpoint.path, name)


def _codec_from_gguf(path: Path, name: str) -> Codec:
    metadata = open_gguf(path, with_tokens=True).metadata
    tokenizer = tokenizer_from_gguf(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    texts = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            texts[role] = tokens[token]
    source = metadata.get("tokenizer.chat_template")
    return Codec(
        name,
        tokenizer,
        ChatTemplate(source, texts) if isinstance(source, str) and source else None,
        _sampling_defaults({ours: metadata.get(f"general.sampling.{theirs}") for ours, theirs, *_ in _DEFAULTS}, "the GGUF file"),
        _context(metadata.get(f"{metadata.get('general.architecture')}.context_length"), "context_length"),
    )


def _codec_from_folder(folder: Path, name: str) -> Codec:
    if not (folder / "tokenizer.json").is_file():
        raise StartupError(f"the folder of {name} has no tokenizer.json; other tokenizer files are not supported")
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, dict) else config
    generation = read_json(folder / "generation_config.json", default={})
    tokenizer_config = read_json(folder / "tokenizer_config.json", default={})
    eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
    eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json"), tokenizer_config, eos_ids)
    source = _template_source(folder, tokenizer_config)
    usual = _USUAL_CONTEXT.get(str(text_config.get("model_type")))
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    texts = {role: token_text(tokenizer_config[role]) for role in roles if tokenizer_config.get(role)}
    return Codec(
        name,
        tokenizer,
        ChatTemplate(source, texts) if source else None,
        _sampling_defaults(generation, "generation_config.json"),
        _context(text_config.get("max_position_embeddings", usual), "max_position_embeddings"),
        _pictures(config),
        _caption_questions(generation),
    )


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own comes before tokenizer_config.json, whose list of named templates has one called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise WeightsError("chat_template.jinja can't be read as UTF-8 text") from error
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) and source else None


def _sampling_defaults(given: Mapping[str, Any], where: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for name, _, least, most in _DEFAULTS:
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
            raise StartupError(f"{where} sets {name} to {value!r}; it must be between {least:g} and {most:g}")
        found[name] = int(value) if name == "top_k" else value
    return found


def _pictures(config: Mapping[str, Any]) -> PictureIds | None:
    """Which ids are codes, of a config that has some; the engine reads the same words. Raises: WeightsError."""
    image = config.get("image")
    if image is None:
        return None
    try:
        return msgspec.convert(image, PictureIds)
    except msgspec.ValidationError as error:
        raise WeightsError(f"the image section of config.json: {error}") from None


def _caption_questions(generation: Mapping[str, Any]) -> tuple[str, ...]:
    given = generation.get("caption_questions", CAPTION_QUESTIONS)
    if not isinstance(given, list | tuple) or not given or not all(isinstance(each, str) for each in given):
        raise StartupError("generation_config.json sets caption_questions to something other than a list of texts")
    return tuple(given)


def _context(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise WeightsError(f"the model's {key} is {value!r}; it must be a positive whole number")
    return value


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(child, change) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(child, change) for child in value]
    return value


def _mapped_message(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Keys and the role are the API's own words, which templates compare."""
    return {key: value if key == "role" else _mapped(value, change) for key, value in message.items()}


def _free_markers(source: str, *values: Any) -> tuple[str, str]:
    """Two markers that neither the template nor any text contains. Raises: RequestError when someone used them all."""
    used = set(MARKERS).intersection(source)

    def note(text: str) -> str:
        used.update(marker for marker in MARKERS if marker in text)
        return text

    try:
        _mapped(values, note)
    except RecursionError:
        raise RequestError("messages are nested too deeply", param="messages") from None
    free = [marker for marker in MARKERS if marker not in used]
    if len(free) < 2:
        raise RequestError("messages use the characters U+FDD0 to U+FDEF, which are not for text; two have to be free", param="messages")
    return free[0], free[1]


def _cut_at(seal: str, rendered: str) -> str:
    """The prompt up to the end of the message that is to be continued. Raises: RequestError when the template does not write it."""
    before, found, _ = rendered.rpartition(seal)
    if not found:
        raise RequestError("the model's chat template does not write the last message, so it can't be continued", param="messages")
    return before.replace(seal, "")
