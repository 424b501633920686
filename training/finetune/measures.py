"""What a classifier gets right: precision, recall and F1 per class, their means, and of whole entities. Plain lists of names, no tensors.

Called by the stage, for early stopping, and by the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

OUTSIDE = "O"
Entity = tuple[str, int, int]
"""Kind, first word, and the word behind the last."""


@dataclass(frozen=True, slots=True)
class Score:
    """hits: right ones; said: how many were predicted; support: how many there are."""

    hits: int
    said: int
    support: int

    @property
    def precision(self) -> float:
        return self.hits / self.said if self.said else 0.0

    @property
    def recall(self) -> float:
        return self.hits / self.support if self.support else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 for a class that is neither there nor predicted."""
        return 2 * self.hits / (self.said + self.support) if self.said + self.support else 0.0


def class_scores(true: Sequence[str], said: Sequence[str]) -> dict[str, Score]:
    """Of every class that is there or was predicted, in alphabetical order."""
    hits = Counter(each for each, other in zip(true, said, strict=True) if each == other)
    support, predicted = Counter(true), Counter(said)
    return {name: Score(hits[name], predicted[name], support[name]) for name in sorted(support.keys() | predicted.keys())}


def total(scores: Sequence[Score]) -> Score:
    """All classes as one: its F1 is the micro F1."""
    return Score(sum(each.hits for each in scores), sum(each.said for each in scores), sum(each.support for each in scores))


def macro_f1(scores: dict[str, Score]) -> float:
    """Mean over the classes that are there: one that was only predicted costs the others' precision already."""
    found = [each.f1 for each in scores.values() if each.support]
    return sum(found) / len(found) if found else 0.0


def has_entities(tags: Sequence[str]) -> bool:
    """Whether the tags mark spans: each is O or begins with the mark of a place in a span."""
    return any(tag != OUTSIDE for tag in tags) and all(tag == OUTSIDE or tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for tag in tags)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The spans of a sentence tagged with B- and I-, or with E- (L-) and S- (U-) as well.

    An I- or E- that continues no span of its kind begins one. Source: Tjong Kim Sang and De Meulder 2003, and their conlleval.
    """
    found: set[Entity] = set()
    kind, begin = "", 0  # of the open span; no kind, no span
    for index, tag in enumerate([*tags, OUTSIDE]):
        mark, _, own = tag.partition("-")
        if kind and not (mark in ("I", "E", "L") and own == kind):
            found.add((kind, begin, index))
            kind = ""
        if own and not kind:
            kind, begin = own, index
        if kind and mark in ("E", "L", "S", "U"):
            found.add((kind, begin, index + 1))
            kind = ""
    return found


def entity_scores(true: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, Score]:
    """By kind; an entity counts when its kind and both its borders are right. One list of tags a sentence."""
    support: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for own, other in zip(true, said, strict=True):
        there, claimed = entities(own), entities(other)
        support.update(kind for kind, _, _ in there)
        predicted.update(kind for kind, _, _ in claimed)
        hits.update(kind for kind, _, _ in there & claimed)
    return {kind: Score(hits[kind], predicted[kind], support[kind]) for kind in sorted(support.keys() | predicted.keys())}
