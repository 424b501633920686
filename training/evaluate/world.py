"""How many tasks of the world are done right: of combinations that were trained, and of ones that never were.

Tasks are thrown by training.world.tasks and judged by training.world.judge; nothing here looks at a pixel. Called by the evaluation's run
and by ablations.
Shape suffixes: N tasks, F frames, S pixels of a side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np

from training.evaluate.reconstruction import to_world_size
from training.evaluate.shares import mean_of, share_of
from training.evaluate.sheet import Strip, write_strips
from training.evaluate.subject import GREEDY, Subject
from training.generate import Sampling
from training.stream.document import Pixels
from training.stream.sources import talk_of
from training.world.judge import Verdict, judge, likeness
from training.world.phrases import LANGS, Lang
from training.world.scene import Scene, World
from training.world.tasks import TASK_NAMES, Task, TaskName, make, make_held_out

Combinations = Literal["trained", "triple", "pair"]
"""Of a task: all trained; with a shape whose (name, colour, size) was never trained; with two things never trained together."""
COMBINATIONS: tuple[Combinations, ...] = ("trained", "triple", "pair")
SHOWN = 4
"""Tasks of a kind on the contact sheet."""
PARTS = ("things", "attributes", "background")
MOST_TOKENS = 96
FREE_FRAMES, FREE_WORDS = 4, 40
"""An answer that the model begins and ends by itself may be as long as a film's four frames with their marks, and so many ids more."""
FREE_SHARE = 3
"""One task of so many is asked a second time, freely."""


@dataclass(frozen=True, eq=False, slots=True)
class Attempt:
    """A task with what the model made of it. frames: uint8 [F, S, S, 3], F is 0 for a text."""

    task: Task
    text: str
    frames: Pixels
    verdict: Verdict


def world_figures(subject: Subject, out: Path, *, count: int, sampling: Sampling = GREEDY) -> dict[str, Any]:
    """Every task with every kind of combination, `count` of each; what was drawn goes on a contact sheet.

    Mutates: world.png in `out`.
    """
    figures: dict[str, Any] = {}
    shown: list[Attempt] = []
    for name in TASK_NAMES:
        figures[name] = {}
        for kind in COMBINATIONS:
            done = attempt(subject, tasks_of(subject, name, kind, count), sampling)
            figures[name][kind] = figures_of(done) | losses_of(subject, [each.task for each in done])
            figures[name][kind]["free"] = free_figures(subject, [each.task for each in done[::FREE_SHARE]])
            if kind != "trained" and len(done[0].frames):
                shown += [each for each in done if each.task.lang == "en"][:SHOWN]
    if shown:
        write_strips(out / "world.png", [_strip(subject, each) for each in shown])
    return figures


def tasks_of(subject: Subject, name: TaskName, kind: Combinations, count: int) -> list[Task]:
    """`count` tasks, two English ones for every Chinese one; the same for every model that is measured with this seed."""
    random = Random(f"{subject.seed}/{name}/{kind}")
    return [_thrown(name, subject.materials.world, random, kind, LANGS[index % len(LANGS)]) for index in range(count)]


def _thrown(name: TaskName, world: World, random: Random, kind: Combinations, lang: Lang) -> Task:
    return make(name, world, random, lang) if kind == "trained" else make_held_out(name, world, random, lang, kind)


def attempt(subject: Subject, tasks: Sequence[Task], sampling: Sampling = GREEDY) -> list[Attempt]:
    """Asks the model and judges what it answers. tasks: all with answers of one length in pictures."""
    talks = [talk_of(task) for task in tasks]
    num_frames = len(tasks[0].scenes) if tasks else 0
    side = subject.materials.recipe.size
    texts = [""] * len(tasks)
    frames = np.empty((len(tasks), 0, side, side, 3), dtype=np.uint8)
    if num_frames:
        frames = subject.pixels(subject.drawings(talks, sampling, num_frames))
    elif tasks:
        texts = subject.texts(talks, Sampling(sampling.temperature, sampling.min_p, sampling.top_k, sampling.seed, MOST_TOKENS))
    read = [to_world_size(each) if num_frames else each for each in frames]
    verdicts = judge(tasks, [[text] if text else [] for text in texts], read, subject.materials.brush)
    return [Attempt(*each) for each in zip(tasks, texts, frames, verdicts, strict=True)]


def free_figures(subject: Subject, tasks: Sequence[Task]) -> dict[str, Any]:
    """Greedy answers of a model that has to choose by itself between words and pictures, and how many. form: is that right? right: all."""
    side = subject.materials.recipe.size
    most = FREE_FRAMES * (subject.pictures.num_places + 1) + FREE_WORDS
    replies = subject.free_replies([talk_of(task) for task in tasks], most)
    drawn = [to_world_size(subject.pixels(codes)) if len(codes) else np.empty((0, side, side, 3), dtype=np.uint8) for _, codes in replies]
    verdicts = judge(tasks, [[text] if text else [] for text, _ in replies], drawn, subject.materials.brush)
    is_form = [len(codes) == len(task.scenes) and bool(text) == bool(task.text) for (text, codes), task in zip(replies, tasks, strict=True)]
    return {"form": share_of(is_form), "right": share_of(verdict.is_right for verdict in verdicts)}


def figures_of(done: Sequence[Attempt]) -> dict[str, Any]:
    """All right, by language, by form of task; and how much of a scene is right where one was asked for."""
    forms: dict[str, list[Attempt]] = defaultdict(list)
    for each in done:
        forms[each.task.form].append(each)
    found: dict[str, Any] = {
        "right": _right(done),
        "en": _right([each for each in done if each.task.lang == "en"]),
        "zh": _right([each for each in done if each.task.lang == "zh"]),
        "forms": {name: _right(attempts) for name, attempts in sorted(forms.items())},
    }
    if any(each.verdict.scenes for each in done):
        found |= {part: mean_of([getattr(each.verdict, part) for each in done]) for part in PARTS}
        found["copies"] = share_of(each.verdict.is_copy for each in done)
    if all(each.task.source is not None and each.task.scenes for each in done):
        found["copy"] = {part: mean_of([getattr(_copied(each.task), part) for each in done]) for part in PARTS}
    num_frames = max((len(each.frames) for each in done), default=0)
    if num_frames > 1:
        found["frames"] = [share_of(each.verdict.scenes[index].is_same for each in done) for index in range(num_frames)]
    return found


def _copied(task: Task) -> Verdict:
    """What somebody gets who hands in the prompt's picture."""
    return Verdict(False, tuple(likeness(scene, task.source) for scene in task.scenes))


def _right(done: Sequence[Attempt]) -> dict[str, float]:
    return share_of(each.verdict.is_right for each in done)


def losses_of(subject: Subject, tasks: Sequence[Task]) -> dict[str, float]:
    """Mean nats of every id of the right replies, and of the codes in them where they are pictures."""
    talks = [talk_of(task) for task in tasks]
    found = {"nats": mean_of(subject.nats(subject.scribe.write(talks)).tolist())}
    return found | ({"nats_per_code": subject.nats_per_code(talks)} if any(task.scenes for task in tasks) else {})


def _strip(subject: Subject, done: Attempt) -> Strip:
    """The prompt in words, its picture, what was drawn, what was wanted."""
    task, draw = done.task, subject.materials.draw
    words = " ".join(piece for piece in task.turn.prompt if isinstance(piece, str))
    scenes = [piece for piece in task.turn.prompt if isinstance(piece, Scene)]
    empty = np.empty((0, *done.frames.shape[1:]), dtype=np.uint8)
    return Strip(words, draw(scenes) if scenes else empty, done.frames, draw(task.scenes), done.verdict.is_right)
