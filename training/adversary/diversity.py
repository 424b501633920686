"""How much a set of texts repeats itself: distinct n-grams and self-BLEU. Lists of words in, numbers out.

Called by the experiment.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Text = Sequence[str]
ORDERS = 4


def ngrams(words: Text, order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))


def distinct(texts: Sequence[Text], order: int = 2) -> float:
    """Different n-grams over all n-grams, 0 ... 1; compare only sets of equally much text. Source: Li et al. 2016, section 5."""
    counts: Counter[tuple[str, ...]] = Counter()
    for words in texts:
        counts.update(ngrams(words, order))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[Text]) -> float:
    """Mean BLEU-4 of every text against all others, 0 ... 1; high when they say the same. An order without a match counts half a match.

    Source: Zhu et al. 2018 (Texygen); Papineni et al. 2002 for BLEU. Every other text is a reference, so its clipped counts come from the
    largest and the second largest count of each n-gram over all texts.
    """
    if len(texts) < 2:
        raise ValueError("a text has to be compared with another")
    logs = [0.0] * len(texts)
    for order in range(1, ORDERS + 1):
        counts = [ngrams(words, order) for words in texts]
        largest: defaultdict[tuple[str, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
        for each in counts:
            for gram, count in each.items():
                largest[gram] = (max(largest[gram][0], count), max(largest[gram][1], min(largest[gram][0], count)))
        for index, each in enumerate(counts):
            # The text's own count is the largest one: then the others have the second.
            hits = sum(min(count, largest[gram][1] if count == largest[gram][0] else largest[gram][0]) for gram, count in each.items())
            logs[index] += math.log(max(hits, 0.5) / max(each.total(), 1)) / ORDERS
    lengths = sorted(map(len, texts))
    return sum(math.exp(log + _brevity(len(words), lengths)) for log, words in zip(logs, texts, strict=True)) / len(texts)


def _brevity(length: int, lengths: list[int]) -> float:
    """The logarithm of BLEU's brevity penalty against the other text whose length is closest, of two the shorter."""
    others = list(lengths)
    others.remove(length)
    closest = min(others, key=lambda each: (abs(each - length), each))
    return min(0.0, 1 - closest / max(length, 1))
