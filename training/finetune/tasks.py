"""The three tasks that a decoder is fine-tuned for: what their files become, and how right the answers are.

A task is plain data: examples and the true names behind them. Called by the command, the stage and the report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.codec.prompt import Codec
from service.errors import RequestError, StartupError
from training.finetune.examples import Example, dialogue_example, labelled_example, tagging_example
from training.finetune.files import read_dialogues, read_labelled, read_sentences
from training.finetune.measures import OUTSIDE, Score, class_scores, entity_scores, has_entities, macro_f1, total

Kind = Literal["tokens", "sequences", "instructions"]
_TIE = 1e-3
"""What a nat of loss counts beside a share of right answers: it decides between epochs that are equally right."""


@dataclass(frozen=True, slots=True)
class Split:
    """true: the classes of every text, in groups as they were read (a sentence's tags, a text's one label); none for instructions."""

    examples: tuple[Example, ...]
    true: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """classes: the names of what is answered, None when that is the next id."""

    kind: Kind
    classes: tuple[str, ...] | None
    splits: dict[str, Split]


@dataclass(frozen=True, slots=True)
class Figures:
    """watched: what early stopping keeps low. summary: by name. tables: scores by name of the table and of the class or kind."""

    watched: float
    summary: dict[str, float]
    tables: dict[str, dict[str, Score]]


def read_task(kind: Kind, files: dict[str, Path], codec: Codec, max_len: int, classes: Sequence[str] | None = None) -> Task:
    """files: by split. classes: those of a model that is only measured; None takes all that the files name.

    Raises: StartupError naming the file, its entry or the class that is wrong.
    """
    if kind == "instructions":
        return Task(kind, None, {name: _dialogues(path, codec, max_len) for name, path in files.items()})
    if kind == "tokens":
        sentences = {name: read_sentences(path) for name, path in files.items()}
        true = {name: tuple(each.tags for each in found) for name, found in sentences.items()}
        known = _classes(true, classes)
        parts = {name: [tagging_example(each, codec, known, max_len) for each in found] for name, found in sentences.items()}
        examples = {name: tuple(example for group in groups for example in group) for name, groups in parts.items()}
    else:
        texts = {name: read_labelled(path) for name, path in files.items()}
        true = {name: tuple((each.label,) for each in found) for name, found in texts.items()}
        known = _classes(true, classes)
        examples = {name: tuple(labelled_example(each, codec, known, max_len) for each in found) for name, found in texts.items()}
    return Task(kind, tuple(known), {name: Split(examples[name], true[name]) for name in files})


def _classes(true: dict[str, tuple[tuple[str, ...], ...]], given: Sequence[str] | None) -> dict[str, int]:
    """Numbers by name. Raises: StartupError for a name that is not among those given."""
    found = {name for groups in true.values() for group in groups for name in group}
    if given is not None and (strange := sorted(found - set(given))):
        raise StartupError(f"the model was not taught {', '.join(strange[:5])}")
    return {name: index for index, name in enumerate(given if given is not None else sorted(found))}


def _dialogues(path: Path, codec: Codec, max_len: int) -> Split:
    found = []
    for number, each in enumerate(read_dialogues(path), 1):
        try:
            found.append(dialogue_example(each, codec, max_len))
        except RequestError as error:
            raise StartupError(f"entry {number} of {path.name}: {error.message}") from error
    examples = tuple(each for each in found if each is not None)
    if not examples:
        raise StartupError(f"{path.name} holds no answer that begins within {max_len} ids")
    return Split(examples, ())


def figures_of(task: Task, split: Split, said: Sequence[int], nats: float) -> Figures:
    """said: the class at every place of the split's examples, in their order. nats: the mean loss there."""
    if task.classes is None:
        return Figures(nats, {"nats": nats, "perplexity": math.exp(min(nats, 50.0))}, {})
    names = [task.classes[each] for each in said]
    true = [name for group in split.true for name in group]
    scores = class_scores(true, names)
    if task.kind == "sequences":
        accuracy = total(list(scores.values())).recall
        return Figures(1 - accuracy + _TIE * nats, {"accuracy": accuracy, "macro_f1": macro_f1(scores), "nats": nats}, {"classes": scores})
    return _tagging_figures(split.true, names, scores, nats)


def _tagging_figures(true: Sequence[Sequence[str]], names: Sequence[str], scores: dict[str, Score], nats: float) -> Figures:
    inside = {name: score for name, score in scores.items() if name != OUTSIDE}
    summary = {
        "token_micro_f1": total(list(scores.values())).f1,
        "token_macro_f1": macro_f1(scores),
        "token_micro_f1_without_o": total(list(inside.values())).f1,
        "token_macro_f1_without_o": macro_f1(inside),
        "nats": nats,
    }
    tables = {"tags": scores}
    if not has_entities([tag for group in true for tag in group]):
        return Figures(1 - summary["token_macro_f1"] + _TIE * nats, summary, tables)
    own = iter(names)
    spans = entity_scores(true, [[next(own) for _ in group] for group in true])
    summary = {"entity_f1": total(list(spans.values())).f1, "entity_macro_f1": macro_f1(spans), **summary}
    return Figures(1 - summary["entity_f1"] + _TIE * nats, summary, {"entities": spans, **tables})
