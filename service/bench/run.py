"""One run from options to figures: users or arrivals, each playing sessions request by request. Called by `cli` and bench/load.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click

from service.bench.datasets import Dataset, Session
from service.bench.options import Options
from service.bench.report import details, figures, print_report, remarks
from service.bench.request import Answer, ask
from service.bench.server import Server

_WARM_TOKENS = 16


@dataclass
class Player:
    """Plays sessions of at most `left` requests together, and keeps their answers. room: has to be entered for each request."""

    server: Server
    options: Options
    left: int
    room: AbstractAsyncContextManager[Any] = field(default_factory=nullcontext)
    answers: list[Answer] = field(default_factory=list)

    async def play(self, session: Session, pauses: Random, *, waits_first: bool) -> None:
        """A conversation ends with its first failure: what would come next needs the answer."""
        think_s, is_first, text = self.options.think_time, True, None
        while self.left > 0:
            self.left -= 1
            request = next(session) if text is None else session.send(text)
            if think_s and (waits_first or not is_first):
                await asyncio.sleep(pauses.expovariate(1 / think_s))
            async with self.room:
                answer = await ask(self.server, self.options.route, request.body, keeps_text=request.has_next)
            if answer.error is None and not answer.has_usage:
                answer.prompt_tokens = request.prompt_len
            self.answers.append(answer)
            if answer.error is not None or not request.has_next:
                return
            is_first, text = False, answer.text


def arrival_times(rate: float, burstiness: float, source: Random) -> Iterator[float]:
    """Seconds from the start, without end. Gaps have a gamma distribution of mean 1 / rate and shape `burstiness`: 1 is Poisson."""
    gaps = (source.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in itertools.count())
    return itertools.accumulate(gaps)


async def closed_loop(player: Player, sessions: Iterator[Session], users: int) -> None:
    """Each user begins its next session when the last one has ended, while requests are left."""

    async def user(number: int) -> None:
        pauses = Random(f"{player.options.seed}/pauses/{number}")
        while player.left > 0:
            await player.play(next(sessions), pauses, waits_first=True)

    await asyncio.gather(*(user(number) for number in range(users)))


async def open_loop(player: Player, sessions: Iterator[Session], times: Iterable[float]) -> None:
    """Sessions begin at their times, whatever became of those before."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, at in enumerate(times):
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            pauses = Random(f"{player.options.seed}/pauses/{number}")
            group.create_task(player.play(next(sessions), pauses, waits_first=False))


async def measure(options: Options) -> tuple[dict[str, Any], list[Answer]]:
    """Figures (with `model_id` and `notes`) and every answer. Raises: StartupError when the server can't be reached or refuses to begin."""
    server = Server(options.base_url, options.api_key)
    # A picture without a model's name is drawn by the first model that draws, which the first of the list may not do.
    model = options.model or ("" if options.dataset_name == "pictures" else await server.first_model())
    dataset = Dataset(options, model)
    await dataset.calibrate(server)
    users = min(options.max_concurrency or options.num_prompts, options.num_prompts)
    if options.warmups:
        warm = dataset.with_short_answers(_WARM_TOKENS)
        await closed_loop(Player(server, warm.options, options.warmups), warm.sessions("warm-up"), min(users, options.warmups))
    player, sessions = Player(server, options, options.num_prompts), dataset.sessions()
    start = time.perf_counter()
    if math.isinf(options.request_rate):
        await closed_loop(player, sessions, users)
    else:
        if options.max_concurrency:
            player.room = asyncio.Semaphore(options.max_concurrency)
        num_sessions = math.ceil(options.num_prompts / (options.num_turns if options.dataset_name == "multi-turn" else 1))
        times = arrival_times(options.request_rate, options.burstiness, Random(f"{options.seed}/arrivals"))
        await open_loop(player, sessions, itertools.islice(times, num_sessions))
    found = figures(player.answers, time.perf_counter() - start, options)
    found |= {"model_id": model, "notes": [*dataset.notes, *remarks(player.answers, options)]}
    return found, player.answers


def run(options: Options, path: Path | None, *, saves_details: bool) -> bool:
    """The command: measures, prints, writes. Did any request complete?"""
    click.echo(f"{options.route} of {options.base_url}: {options.num_prompts} requests, {options.dataset_name}")
    found, answers = asyncio.run(measure(options))
    print_report(found, options, found["notes"])
    if path is not None:
        written = {**found, "options": options.told(), **(details(answers) if saves_details else {})}
        path.write_text(json.dumps(written, indent=1) + "\n")
    return bool(found["completed"])
