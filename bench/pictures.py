"""Pictures under load: how many a second, how soon the first preview, what chats beside them feel, and what the iterative ways are worth.

    python -m bench.pictures load --users 1 16               closed loop over HTTP: so many users draw, streaming previews
    python -m bench.pictures company                         chats alone, and the same chats while others draw
    python -m bench.pictures steps                           engine steps without a picture in flight, and with some all the time
    python -m bench.pictures jacobi                          engine steps and seconds that guessing codes ahead saves
    python -m bench.pictures iterate                         refine and best_of beside plain drawing, at equal compute

Each prints a table and writes its figures with --json. What is drawn are scenes that a program can judge, and emoji.
Long: five questions about one thing, with one file of figures.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import httpx
import numpy as np
from PIL import Image

from bench.lane import Loop, load_lane
from bench.load import load_of, measure, print_table, run_load, serving
from bench.probe import describe_machine
from service.bench.options import Options
from service.bench.request import ask
from service.bench.server import Server
from service.catalog import resolve
from service.codec.prompt import load_codec
from service.engine.messages import Load as LoadMessage
from service.runner.load import Loaded
from service.scheduling.picture_grammar import PictureGrammar, PictureRule
from service.scheduling.pictures import PictureRequest
from service.scheduling.plan import PictureWork
from service.scheduling.sampling import SamplingParams

NAME = "braid-nano"
EMOJI = ("cat face, noto style", "turtle, twemoji style", "red apple, noto style", "soccer ball, fluentflat style", "pizza, noto style")


def scenes(count: int, seed: int, world: Any = None) -> list[Any]:
    """Tasks of a world (of its shapes alone, if none is given) whose scenes have a pair of things that was never trained."""
    from training.world.scene import World
    from training.world.tasks import make_held_out

    random = Random(seed)
    return [make_held_out("draw", world or World(), random, "en", "pair") for _ in range(count)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] * 1e3

    return {"mean": statistics.fmean(ordered) * 1e3, "p50": at(0.5), "p95": at(0.95), "p99": at(0.99)} if ordered else {}


# -- load --


@dataclass
class Drawer:
    """What the users of a closed loop measured, in seconds since each request was sent."""

    previews: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    failed: int = 0


async def draw_for(url: str, users: int, until: Callable[[int], bool], options: dict[str, Any]) -> tuple[Drawer, float]:
    """Each user draws while `until` of its number of pictures is false. Returns what they measured and the seconds it took."""
    drawer, server = Drawer(), Server(url)

    async def user(number: int) -> None:
        turn = 0
        while not until(turn):
            prompt = EMOJI[(number + turn) % len(EMOJI)]
            body = {"model": NAME, "prompt": prompt, "seed": 1000 * number + turn, "stream": True, "partial_images": 2, **options}
            answer = await ask(server, "/v1/images/generations", body)
            if answer.error is not None:
                drawer.failed += 1
            else:
                drawer.previews.append(answer.ttft_s)
                drawer.totals.append(answer.e2el_s)
            turn += 1

    start = time.perf_counter()
    await asyncio.gather(*(user(number) for number in range(users)))
    return drawer, time.perf_counter() - start


def drawn_by(url: str, users: int, count: int, **options: Any) -> dict[str, Any]:
    drawer, seconds = asyncio.run(draw_for(url, users, lambda turn: turn >= count, options))
    return {
        "users": users,
        "pictures": len(drawer.totals),
        "failed": drawer.failed,
        "pictures_per_s": len(drawer.totals) / seconds,
        "first_preview_ms": spread(drawer.previews),
        "picture_ms": spread(drawer.totals),
    }


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure pictures."""


def _write(path: Path | None, name: str, figures: Any, options: dict[str, Any]) -> None:
    """Adds to a file that may hold the figures of other commands."""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        known[name] = {"machine": describe_machine(), "options": options, "figures": figures}
        path.write_text(json.dumps(known, indent=1) + "\n")


_JSON = click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Add all figures to this file.")


@main.command()
@click.option("--users", multiple=True, type=click.IntRange(1, 1024), default=(1, 16), help="Who draw at once; repeatable.")
@click.option("--pictures", "count", default=12, help="That each draws.")
@click.option("--jacobi", default=None, type=int, help="Codes to guess ahead.")
@click.option("--server-argument", multiple=True, help="Passed on to `braid serve`; repeatable.")
@_JSON
def load(users: tuple[int, ...], count: int, jacobi: int | None, server_argument: tuple[str, ...], json_path: Path | None) -> None:
    """Pictures a second, and how soon, over HTTP, with two previews each."""
    options = {} if jacobi is None else {"jacobi": jacobi}
    with serving(NAME, [*server_argument, "--data-dir", "off"]) as (url, _):
        drawn_by(url, 2, 2)
        rows = [drawn_by(url, number, count, **options) for number in users]
    click.echo(f"{'users':>6} {'pictures/s':>11} {'preview p50':>12} {'p95':>9} {'picture p50':>12} {'p95':>9} {'failed':>7}")
    for row in rows:
        first, whole = row["first_preview_ms"], row["picture_ms"]
        click.echo(
            f"{row['users']:>6} {row['pictures_per_s']:>11.1f} {first['p50']:>9.1f} ms {first['p95']:>6.1f} ms {whole['p50']:>9.1f} ms "
            f"{whole['p95']:>6.1f} ms {row['failed']:>7}"
        )
    _write(json_path, "load", rows, {"users": users, "pictures": count, "jacobi": jacobi})


# -- company --


@main.command()
@click.option("--chats", default=4, help="Users that chat with the text model.")
@click.option("--drawers", default=4, help="Users that draw meanwhile.")
@click.option("--rounds", default=5, help="Alternations of chats alone and chats in company.")
@_JSON
def company(chats: int, drawers: int, rounds: int, json_path: Path | None) -> None:
    """Chat latency alone and beside those who draw: the default models in one engine, both kinds in turn, in one run."""
    chat = load_of(chats, 2, random_input_len=139, random_output_len=96, seed=1)
    alone: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    drawn: list[dict[str, Any]] = []
    with serving("", ["--data-dir", "off"]) as (url, _):
        measure(url, [chat])
        for _ in range(rounds):
            alone += measure(url, [chat])
            rows, pictures = asyncio.run(_chats_beside(url, chat, drawers))
            beside.append(rows)
            drawn.append(pictures)
    print_table("chats alone", alone, 0.0)
    print_table(f"chats beside {drawers} who draw", beside, 0.0)
    pairs = zip(alone, beside, strict=True)
    ratio = statistics.median(second["median_tpot_ms"] / first["median_tpot_ms"] for first, second in pairs)
    rate = statistics.median([row["pictures_per_s"] for row in drawn])
    click.echo(f"\ntime per token beside pictures: {ratio:.2f} x; {rate:.1f} pictures/s meanwhile")
    options = {"chats": chats, "drawers": drawers, "rounds": rounds}
    _write(json_path, "company", {"alone": alone, "beside": beside, "drawn": drawn, "tpot_ratio": ratio}, options)


async def _chats_beside(url: str, chat: Options, drawers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    is_over = False
    drawing = asyncio.create_task(draw_for(url, drawers, lambda turn: is_over, {}))
    await asyncio.sleep(0.3)
    rows = await run_load(url, chat)
    is_over = True
    drawer, seconds = await drawing
    return rows, {"pictures_per_s": len(drawer.totals) / seconds, "failed": drawer.failed, "picture_ms": spread(drawer.totals)}


# -- steps --

ROUNDS = 16
"""In which two kinds alternate: the machine's own pace changes from second to second."""


@main.command()
@click.option("--sequences", default=8, help="That draw in every step.")
@click.option("--steps", "count", default=6000, help="Of each kind.")
@_JSON
def steps(sequences: int, count: int, json_path: Path | None) -> None:
    """Seconds of an engine step while nothing is drawn or read, and while the painter always has a batch in hand; the two alternate."""
    loaded, message = load_lane(NAME)
    durations: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(2 * ROUNDS):
        kind = ("without", "with")[number % 2]
        durations[kind] += _steps(loaded, message, sequences, count // ROUNDS, has_pictures=kind == "with")
    found = {kind: spread(values) for kind, values in durations.items()}
    ratios = {name: found["with"][name] / found["without"][name] for name in ("p50", "p95", "p99")}
    for kind, figures in found.items():
        click.echo(f"{kind:>8}: " + "  ".join(f"{name} {value:.3f} ms" for name, value in figures.items()))
    click.echo("   ratio: " + "  ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    _write(json_path, "steps", {**found, "ratios": ratios}, {"sequences": sequences, "steps": count})


def _steps(loaded: Loaded, message: LoadMessage, sequences: int, count: int, *, has_pictures: bool) -> Iterator[float]:
    pictures = loaded.info.pictures
    if pictures is None:
        raise click.ClickException(f"{NAME} has no pictures")
    loop = Loop(loaded, message)
    names = iter(range(10**9))
    while len(loop.durations) < count:
        while loop.scheduler.num_running + loop.scheduler.num_waiting < sequences:
            _add(loop, f"s{next(names)}", next(names))
        if has_pictures and not loop.is_painting:
            for _ in range(4):
                work = PictureWork(f"d{next(names)}", codes=(pictures.first_code + 5,) * pictures.num_places)
                loop.scheduler.add_picture(PictureRequest(work), 0.0)
        loop.step()
    yield from loop.durations[20:]


def _add(loop: Loop, name: str, seed: int, prompt: Sequence[int] = (1, 3, 300, 301, 302, 4, 5), draft_len: int = 0) -> None:
    """A picture to be drawn as braid-nano's own files say."""
    pictures = loop.lane.info.pictures
    if pictures is None:
        raise click.ClickException(f"{NAME} has no pictures")
    params = SamplingParams(max_tokens=pictures.num_places, seed=seed, temperature=0.9, min_p=0.1)
    loop.add(name, prompt, params, draft_len=draft_len, grammar=PictureGrammar(pictures, PictureRule(1), pictures.num_places))


# -- jacobi --


@main.command()
@click.option("--users", multiple=True, type=click.IntRange(1, 64), default=(1, 2, 4, 8, 16), help="Pictures drawn at once; repeatable.")
@click.option(
    "--lengths",
    multiple=True,
    type=click.IntRange(0, 64),
    default=(0, 2, 4, 8, 16),
    help="Of the guesses, the first to compare with; repeatable.",
)
@click.option("--pictures", "count", default=48, help="Of each kind.")
@_JSON
def jacobi(users: tuple[int, ...], lengths: tuple[int, ...], count: int, json_path: Path | None) -> None:
    """Steps and seconds by how many codes are guessed ahead; the pictures are compared code by code."""
    loaded, message = load_lane(NAME)
    codec = load_codec(resolve(NAME).path, name=NAME)
    begin = codec.pictures.begin_id if codec.pictures is not None else 0
    prompts = [*EMOJI, *("".join(map(str, task.turn.prompt)) for task in scenes(len(EMOJI), 3))]
    ids = [(*codec.encode_chat([{"role": "user", "content": text}]), begin) for text in prompts]
    rows = []
    for together in users:
        spent = {length: [0, 0.0] for length in lengths}
        for turn in range(ROUNDS // 4):
            codes: list[dict[str, list[int]]] = []
            for length in lengths:
                loop = Loop(loaded, message, max_drafting=64)
                start = time.perf_counter()
                for first in range(0, count, together):
                    for number in range(first, min(first + together, count)):
                        _add(loop, f"p{number}", turn * count + number, ids[number % len(ids)], length)
                    while loop.scheduler.has_work:
                        loop.step()
                spent[length][0] += len(loop.durations)
                spent[length][1] += time.perf_counter() - start
                codes.append(loop.ids)
            if any(each != codes[0] for each in codes):
                raise click.ClickException("guessing changed a code")
        num_steps, seconds = spent[lengths[0]]
        for length, (own_steps, own_seconds) in spent.items():
            row = {"together": together, "length": length, "steps_per_picture": own_steps * together / count / (ROUNDS // 4)}
            rows.append({**row, "seconds": own_seconds, "step_ratio": num_steps / own_steps, "speed_up": seconds / own_seconds})
    click.echo(f"{'at once':>8} {'guessed':>8} {'steps a picture':>16} {'fewer steps':>12} {'faster':>8}")
    for row in rows:
        ratio, speed_up = row["step_ratio"], row["speed_up"]
        click.echo(f"{row['together']:>8} {row['length']:>8} {row['steps_per_picture']:>16.1f} {ratio:>10.2f} x {speed_up:>6.2f} x")
    _write(json_path, "jacobi", rows, {"pictures": count})


# -- iterate --

# What one picture costs in tokens computed: plain drawing is one prompt and 64 codes.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, greedy": {"temperature": 0},
    "plain, temperature 0.5": {"temperature": 0.5},
    "best of 2": {"best_of": 2},
    "best of 4": {"best_of": 4},
    "refine 1": {"refine": 1},
    "refine 2": {"refine": 2},
    "refine 4": {"refine": 4},
    "guidance 2": {"guidance_scale": 2.0},
}


@main.command()
@click.option("--scenes", "count", default=150, help="Of a pair of things that was never trained.")
@click.option("--seed", default=11)
@_JSON
def iterate(count: int, seed: int, json_path: Path | None) -> None:
    """Shares of scenes with everything right, judged by a program that reads the pixels, beside the tokens that each way computed."""
    from training.materials import load_materials
    from training.recipe import read_recipe
    from training.world.judge import judge

    materials = load_materials(read_recipe("nano").data)
    tasks = scenes(count, seed, materials.world)
    texts = ["".join(map(str, task.turn.prompt)) for task in tasks]
    rows: list[dict[str, Any]] = []
    with serving(NAME, ["--data-dir", "off"]) as (url, _):
        for name, options in WAYS.items():
            before = _tokens(url)
            start = time.perf_counter()
            pictures = asyncio.run(_all_drawn(url, texts, options))
            seconds = time.perf_counter() - start
            verdicts = judge(tasks, [()] * count, pictures, materials.brush)
            right = sum(verdict.is_right for verdict in verdicts) / count
            attributes = statistics.fmean(verdict.attributes for verdict in verdicts)
            row = {"way": name, "right": right, "attributes": attributes, "tokens": _tokens(url) - before, "seconds": seconds}
            rows.append({**row, "compute": row["tokens"] / (rows[0]["tokens"] if rows else row["tokens"])})
    error = (0.25 / count) ** 0.5
    click.echo(
        f"{'way':>24} {'right':>7} {'attributes':>11} {'tokens':>8} {'seconds':>8}   (n {count}, at most +- {error:.1%} at one sigma)"
    )
    for row in rows:
        click.echo(f"{row['way']:>24} {row['right']:>7.1%} {row['attributes']:>11.1%} {row['compute']:>6.2f} x {row['seconds']:>8.1f}")
    _write(json_path, "iterate", rows, {"scenes": count, "seed": seed})


async def _all_drawn(url: str, texts: Sequence[str], options: dict[str, Any]) -> list[Any]:
    """uint8 [1, S, S, 3] of each text."""
    room = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def one(number: int, text: str) -> Any:
            async with room:
                answer = await client.post("/v1/images/generations", json={"prompt": text, "seed": number * 64, **options})
            data = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[None]

        return list(await asyncio.gather(*(one(number, text) for number, text in enumerate(texts))))


def _tokens(url: str) -> float:
    """That all steps together computed."""
    text = httpx.get(f"{url}/metrics").text
    line = next((each for each in text.splitlines() if each.startswith("braid:iteration_tokens_total_sum")), " 0")
    return float(line.rpartition(" ")[2])


if __name__ == "__main__":
    main()
