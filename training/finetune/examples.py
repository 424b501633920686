"""Texts as what a decoder reads and where it has to answer: every task is ids, places among them, and the right class at each place.

Asks the codec for ids, so a text is cut as the server would cut it. No tensors. Called by the tasks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from service.codec.prompt import Codec
from service.errors import StartupError
from training.finetune.files import Dialogue, Labelled, Sentence


@dataclass(frozen=True, slots=True)
class Example:
    """At places[i] of the ids the answer is targets[i]: a class, or the id that comes next."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    targets: tuple[int, ...]


def tagging_example(sentence: Sentence, codec: Codec, classes: Mapping[str, int], max_len: int) -> list[Example]:
    """A word is answered for at its first id, the words as running text. A sentence of more than max_len ids becomes several examples.

    Raises: StartupError for a word of more than max_len ids, or a vocabulary that changes the text.
    """
    head = _head(codec)
    ids = codec.tokenizer.encode(" ".join(sentence.words))
    if len(head) + len(ids) > max_len:
        if len(sentence.words) == 1:
            raise StartupError(f"a word of {len(sentence.words[0])} letters has more than {max_len} ids")
        half = len(sentence.words) // 2
        parts = (Sentence(sentence.words[at], sentence.tags[at]) for at in (slice(0, half), slice(half, None)))
        return [each for part in parts for each in tagging_example(part, codec, classes, max_len)]
    places = [len(head) + place for place in _first_ids(sentence.words, ids, codec)]
    return [Example((*head, *ids), tuple(places), tuple(classes[tag] for tag in sentence.tags))]


def _first_ids(words: Sequence[str], ids: Sequence[int], codec: Codec) -> list[int]:
    """For every word the place of the id that holds its first byte; an id may begin with the space before.

    Raises: StartupError when the ids' bytes are not the text's.
    """
    ends = list(accumulate(len(codec.tokenizer.token_bytes(token)) for token in ids))
    written = b"".join(codec.tokenizer.token_bytes(token) for token in ids)
    text = " ".join(words).encode()
    lead = len(written) - len(text)  # some vocabularies begin every text with a space
    if lead not in (0, 1) or written[lead:] != text:
        raise StartupError(f"the vocabulary of {codec.name} does not keep texts as they are, so words can't be found in its ids")
    starts = accumulate((len(word.encode()) + 1 for word in words[:-1]), initial=lead)
    return [bisect_right(ends, start) for start in starts]


def labelled_example(example: Labelled, codec: Codec, classes: Mapping[str, int], max_len: int) -> Example:
    """The answer is given at the last id, which has seen the whole text whatever the mask; a longer text is cut."""
    ids = (codec.encode_document(example.text) or list(codec.eos_ids))[:max_len]
    return Example(tuple(ids), (len(ids) - 1,), (classes[example.label],))


def dialogue_example(dialogue: Dialogue, codec: Codec, max_len: int) -> Example | None:
    """Every id of the last message, and the end behind it, is to be predicted. None when max_len leaves nothing of it.

    Raises: RequestError when the chat template refuses the messages; StartupError when there is no template and more than one prompt.
    """
    head, whole = _dialogue_ids(dialogue, codec)
    ids = whole[:max_len]
    places = range(len(head) - 1, len(ids) - 1)
    if not places:
        return None
    return Example(tuple(ids), tuple(places), tuple(ids[place + 1] for place in places))


def _dialogue_ids(dialogue: Dialogue, codec: Codec) -> tuple[list[int], list[int]]:
    """What is read before the answer, and all of it."""
    *before, answer = dialogue.messages
    end = list(codec.eos_ids[:1])
    if codec.template is None:
        if len(before) != 1:
            raise StartupError(f"{codec.name} has no chat template; give prompts and completions instead of messages")
        head = codec.encode_text(before[0]["content"])
        return head, [*head, *codec.tokenizer.encode(answer["content"]), *end]
    head = codec.encode_chat(before)
    whole = codec.encode_chat(dialogue.messages, add_generation_prompt=False)
    if whole[: len(head)] == head:
        return head, whole
    return head, [*head, *codec.tokenizer.encode(answer["content"]), *end]  # the template writes past answers in another way


def _head(codec: Codec) -> list[int]:
    ends = codec.tokenizer.ends
    return [ends.bos_id] if ends.add_bos and ends.bos_id is not None else []
