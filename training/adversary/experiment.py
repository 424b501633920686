"""Does a discriminator that picks the best of n continuations bring a language model closer to real text than a temperature does?

Every set of texts and of features is a file in the folder of the run, so an interrupted run goes on where it was. Called by __main__.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from service.errors import StartupError
from training.adversary.classifier import Features, choose_penalty, fit, two_sample_test
from training.adversary.diversity import distinct, self_bleu

Ids = list[list[int]]
FEATURES = "features"


@dataclass(frozen=True, slots=True)
class Design:
    """prompts: that are judged; learned: other ones that discriminator and judge's penalty are learned from. prompt_len, reply_len in ids.
    sweep: temperatures of single continuations. reranked: temperatures at which the best of `candidates` is taken; draws: how many of the
    candidates stand for single continuations there, whose figures are averaged."""

    prompts: int = 160
    learned: int = 160
    prompt_len: int = 24
    reply_len: int = 40
    sweep: tuple[float, ...] = (0.5, 0.6, 0.7, 0.9, 1.1, 1.2)
    reranked: tuple[float, ...] = (0.8, 1.0)
    candidates: int = 8
    draws: int = 3
    seed: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Tools:
    """generate: continuations of prompts at a temperature, by a seed. write: the text of prompt and reply, of the reply alone.
    rank_features, judge_features: of prompts with replies, two kinds that know nothing of each other."""

    generate: Callable[[Ids, float, int], Ids]
    write: Callable[[Sequence[int]], str]
    rank_features: Callable[[Ids, Ids], Features]
    judge_features: Callable[[Ids, Ids], Features]


@dataclass(frozen=True, slots=True)
class Point:
    """One way to continue the prompts. accuracy: of a judge trained to tell its texts from real ones; 0.5 is perfect."""

    name: str
    temperature: float
    candidates: int
    accuracy: float
    error: float
    distinct_2: float
    self_bleu: float


@dataclass(frozen=True, eq=False)
class Experiment:
    """judged, learned: documents as ids, each long enough for prompt and reply, no document in both. about: which models do what, in words;
    a folder is one design's with one set of models."""

    design: Design
    tools: Tools
    judged: Ids
    learned: Ids
    folder: Path
    about: Mapping[str, str] = field(default_factory=dict)

    def run(self, say: Callable[[str], None]) -> list[Point]:
        """The points of the sweep, then of single and reranked continuations at each reranked temperature. Mutates: the folder.

        Raises: StartupError when the folder holds another design's run.
        """
        self._claim()
        penalty = self._penalty()
        say(f"the judge's penalty is {penalty:g}")
        points = [self._point("sweep", each, [self._generated("judged", each, 0)], 1, penalty) for each in self.design.sweep]
        for temperature in self.design.reranked:
            pool = [self._generated("judged", temperature, seed) for seed in range(self.design.candidates)]
            points.append(self._point("sweep", temperature, pool[: self.design.draws], 1, penalty))
            best = self._best(pool, temperature)
            points.append(self._point("best", temperature, [best], self.design.candidates, penalty))
            for each in points[-2:]:
                say(f"{each.name} at {temperature:g}: accuracy {each.accuracy:.3f} +- {each.error:.3f}, distinct-2 {each.distinct_2:.3f}")
        return points

    def _claim(self) -> None:
        """Raises: StartupError when the folder holds what another design left there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note, values = self.folder / "design.json", json.dumps({**asdict(self.design), "about": dict(self.about)})
        if note.exists() and note.read_text(encoding="ascii") != values:
            raise StartupError(f"{self.folder.name} holds a run of another design; name another folder")
        note.write_text(values, encoding="ascii")

    def _prompts(self, which: str) -> Ids:
        return [each[: self.design.prompt_len] for each in (self.judged if which == "judged" else self.learned)]

    def _real(self, which: str) -> Ids:
        end = self.design.prompt_len + self.design.reply_len
        return [each[self.design.prompt_len : end] for each in (self.judged if which == "judged" else self.learned)]

    def _generated(self, which: str, temperature: float, seed: int) -> Ids:
        """One continuation of each prompt. Mutates: the folder, on the first call."""
        path = self.folder / f"{which}-{temperature:g}-{seed}.json"
        if not path.exists():
            replies = self.tools.generate(self._prompts(which), temperature, self.design.seed * 1000 + seed)
            _put(path, json.dumps(replies).encode())
        found: Ids = json.loads(path.read_text(encoding="ascii"))
        return found

    def _features(self, kind: str, which: str, name: str, replies: Ids) -> Features:
        path = self.folder / f"{kind}-{which}-{name}.safetensors"
        if not path.exists():
            measure = self.tools.rank_features if kind == "rank" else self.tools.judge_features
            save_file({FEATURES: np.ascontiguousarray(measure(self._prompts(which), replies))}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        found: Features = load_file(path)[FEATURES]
        return found

    def _penalty(self) -> float:
        """The judge's, chosen on the prompts that are learned from."""
        temperature = self.design.reranked[0]
        real = self._features("judge", "learned", "real", self._real("learned"))
        fake = self._features("judge", "learned", f"{temperature:g}-0", self._generated("learned", temperature, 0))
        return choose_penalty(real, fake)

    def _best(self, pool: Sequence[Ids], temperature: float) -> Ids:
        """For every prompt the candidate that the discriminator takes for the realest."""
        real = self._features("rank", "learned", "real", self._real("learned"))
        fake = self._features("rank", "learned", f"{temperature:g}-0", self._generated("learned", temperature, 0))
        discriminator = fit(real, fake, choose_penalty(real, fake))
        found = [self._features("rank", "judged", f"{temperature:g}-{seed}", each) for seed, each in enumerate(pool)]
        chosen = np.stack([discriminator(each) for each in found]).argmax(0)
        return [pool[which][row] for row, which in enumerate(chosen.tolist())]

    def _point(self, name: str, temperature: float, sets: Sequence[Ids], candidates: int, penalty: float) -> Point:
        """The means over several sets of continuations."""
        real = self._features("judge", "judged", "real", self._real("judged"))
        tests, texts = [], []
        for index, replies in enumerate(sets):
            features = self._features("judge", "judged", f"{name}-{temperature:g}-{index}", replies)
            tests.append(two_sample_test(real, features, penalty))
            texts.append([self.tools.write(each).split() for each in replies])
        return Point(
            name=name,
            temperature=temperature,
            candidates=candidates,
            accuracy=float(np.mean([each.accuracy for each in tests])),
            error=float(np.mean([each.error for each in tests])),  # the draws share prompts and real texts: no division by their number
            distinct_2=float(np.mean([distinct(each) for each in texts])),
            self_bleu=float(np.mean([self_bleu(each) for each in texts])),
        )

    def real_diversity(self) -> tuple[float, float]:
        """distinct-2 and self-BLEU of the real continuations."""
        texts = [self.tools.write(each).split() for each in self._real("judged")]
        return distinct(texts), self_bleu(texts)


def gain_at_equal_diversity(points: Sequence[Point], best: Point) -> float | None:
    """How much lower the judge's accuracy is for `best` than on the sweep's curve at the same distinct-2, points of accuracy.

    The curve is a straight line between neighbouring temperatures; None beyond its ends, where nothing was measured.
    """
    sweep = sorted((each.distinct_2, each.accuracy) for each in points if each.candidates == 1)
    places, heights = [place for place, _ in sweep], [height for _, height in sweep]
    if not places[0] <= best.distinct_2 <= places[-1]:
        return None
    return float(np.interp(best.distinct_2, places, heights)) - best.accuracy


def record(points: Sequence[Point], design: Design, real: tuple[float, float], about: Mapping[str, str]) -> str:
    """All that was measured, as JSON."""
    gains = {f"{each.temperature:g}": gain_at_equal_diversity(points, each) for each in points if each.candidates > 1}
    whole = {
        "about": dict(about),
        "design": asdict(design),
        "real": {"distinct_2": real[0], "self_bleu": real[1]},
        "points": [asdict(each) for each in points],
        "gain_at_equal_distinct_2": gains,
    }
    return json.dumps(whole, indent=2) + "\n"


def _put(path: Path, data: bytes) -> None:
    """Never half a file."""
    path.with_suffix(".tmp").write_bytes(data)
    path.with_suffix(".tmp").replace(path)
