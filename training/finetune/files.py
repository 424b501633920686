"""Data sets for fine-tuning as people keep them: CoNLL columns, JSONL or CSV with labels, JSONL with prompts and completions.

Checks every line and names the one that is wrong; knows no vocabulary and no model. Called by the command and by the proof.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from service.errors import StartupError

T = TypeVar("T")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Sentence:
    """As many tags as words."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages with role and content; the last is the assistant's, and it is what shall be learned."""

    messages: tuple[Mapping[str, str], ...]


def read_sentences(path: Path) -> list[Sentence]:
    """A CoNLL-format file: a line a word, its first column the word and its last the tag; blank lines between sentences.

    Lines that begin with -DOCSTART- are left out. Raises: StartupError naming the line that has no tag.
    """
    sentences, words, tags = [], [], []
    for number, line in enumerate([*_lines(path), ""], 1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise StartupError(f"line {number} of {path.name} has one column; a word needs a tag behind it")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            sentences.append(Sentence(tuple(words), tuple(tags)))
            words, tags = [], []
    return _some(sentences, path)


def write_sentences(path: Path, sentences: Sequence[Sentence]) -> None:
    """The reverse of `read_sentences`. Mutates: the file."""
    blocks = ("".join(f"{word}\t{tag}\n" for word, tag in zip(each.words, each.tags, strict=True)) for each in sentences)
    path.write_text("\n".join(blocks), encoding="utf-8")


def read_labelled(path: Path) -> list[Labelled]:
    """A .csv file with the columns text and label, or a .jsonl file of objects with these keys.

    Raises: StartupError naming the entry that lacks one of them.
    """
    found = []
    for number, row in enumerate(_rows(path), 1):
        text, label = row.get("text"), row.get("label")
        is_label = isinstance(label, str | int) and str(label).strip()
        if not isinstance(text, str) or not text.strip() or not is_label:
            raise StartupError(f"entry {number} of {path.name} must have a text and a label")
        found.append(Labelled(text, str(label)))
    return _some(found, path)


def write_labelled(path: Path, examples: Sequence[Labelled]) -> None:
    """As JSONL. Mutates: the file."""
    path.write_text(
        "".join(json.dumps({"text": each.text, "label": each.label}, ensure_ascii=False) + "\n" for each in examples), encoding="utf-8"
    )


def read_dialogues(path: Path) -> list[Dialogue]:
    """A .jsonl file of objects with prompt and completion, or with messages whose last is the assistant's.

    Raises: StartupError naming the entry that is neither.
    """
    found = []
    for number, row in enumerate(_rows(path), 1):
        messages = row.get("messages")
        if messages is None:
            messages = [{"role": "user", "content": row.get("prompt")}, {"role": "assistant", "content": row.get("completion")}]
        if not _is_dialogue(messages):
            raise StartupError(
                f"entry {number} of {path.name} must have a prompt and a completion, or messages "
                f"of the roles {', '.join(ROLES)} whose last is the assistant's"
            )
        found.append(Dialogue(tuple({"role": each["role"], "content": each["content"]} for each in messages)))
    return _some(found, path)


def _is_dialogue(messages: Any) -> bool:
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(each, dict) for each in messages):
        return False
    return messages[-1].get("role") == "assistant" and all(
        each.get("role") in ROLES and isinstance(each.get("content"), str) and each["content"] for each in messages
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    lines = _lines(path)
    if path.suffix == ".csv":
        yield from csv.DictReader(line + "\n" for line in lines)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StartupError(f"line {number} of {path.name} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise StartupError(f"line {number} of {path.name} is no JSON object")
        yield row


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path.name} can't be read as UTF-8 text") from error


def _some(found: list[T], path: Path) -> list[T]:
    if not found:
        raise StartupError(f"{path.name} holds no examples")
    return found
