"""What an arriving prompt does to those who read along, and how soon an answer begins whose prompt is cached, both over HTTP.

    python -m bench.stall --json stall.json          starts `braid serve` itself
    python -m bench.stall --url http://127.0.0.1:8000

Stall: so many users stream answers; when all have read a while, a long prompt arrives. Of each user the median gap between two chunks is
taken before that moment, and the largest from then to a little after the long prompt's first token; the worst of largest - median counts.
A control is the same of the time before, when nothing arrives: what the machine does by itself.
Cached: one user asks the same 512 tokens again and again; the time to the first token in steps of the same answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import httpx

from bench.load import serving
from bench.probe import describe_machine

# One token each, with the space before it, in the vocabularies that are served here.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month lot right"
).split()
_NEWS = re.compile(rb'"content":"[^"]|"token_ids":\[[0-9]')
_STEADY_CHUNKS = 40  # read by every user before the prompt arrives; the first ten still see others begin
_BEGIN_CHUNKS = 10
_AFTER_S = 0.1  # after the long prompt's first token: its last step has reached everybody by then
_SHORT_TOKENS = 64


@dataclass
class Stream:
    """One streamed answer, by the clock of time.perf_counter. times: of chunks with a token."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent

    def gaps_s(self, start: float, end: float) -> list[float]:
        """Between chunks of which the later one came in this time."""
        return [later - earlier for earlier, later in pairwise(self.times) if start < later <= end]


class Desk:
    """Asks one server for answers."""

    def __init__(self, url: str) -> None:
        self.url = httpx.URL(url)
        self.model: str = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": self.model, "messages": [{"role": "user", "content": "time" + 19 * " time"}], "max_tokens": 1}
        usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()["usage"]
        self._frame = usage["prompt_tokens"] - 20

    def prompt(self, tokens: int, seed: str) -> str:
        source = random.Random(seed)
        return " ".join(source.choice(WORDS) for _ in range(tokens - self._frame))

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0}
        # With its ids a token without text (the end of an answer, half of a letter) has a chunk as well.
        more = {"stream_options": {"include_usage": True}, "ignore_eos": True, "return_token_ids": True}
        return body | {"stream": True, **more}

    async def ask(self, prompt: str, max_tokens: int, stream: Stream) -> None:
        """Over a plain socket: through httpx a chunk cost the client 0.27 ms of the machine it shares with the server. Mutates: stream."""
        content = json.dumps(self._body(prompt, max_tokens)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.url.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        stream.sent = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.url.host, self.url.port)
        try:
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            status = await reader.readline()
            if status.split()[1:2] != [b"200"]:
                raise click.ClickException((status + await reader.read()).decode(errors="replace")[-300:])
            tail = b""
            while data := await reader.read(65_536):
                # The first chunk may carry only the role.
                if _NEWS.search(data):
                    stream.times.append(time.perf_counter())
                tail = (tail + data)[-4000:]
        finally:
            writer.close()
        usage = next((line for line in reversed(tail.splitlines()) if b'"usage":{' in line), b"")
        if not usage:
            raise click.ClickException("a stream ended without its usage")
        stream.cached_tokens = (json.loads(usage[6:])["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def stall(desk: Desk, users: int, long_tokens: int, seed: str) -> dict[str, Any]:
    """One arrival among users who read."""
    streams, arrival = [Stream() for _ in range(users)], Stream()
    prompts = [desk.prompt(_SHORT_TOKENS, f"{seed}/{number}") for number in range(users)]
    readers = [asyncio.create_task(desk.ask(prompt, 4096, stream)) for prompt, stream in zip(prompts, streams, strict=True)]
    try:
        while min(len(stream.times) for stream in streams) < _STEADY_CHUNKS:
            if ended := next((task for task in readers if task.done()), None):
                ended.result()
                raise click.ClickException("an answer ended before the prompt could arrive")
            await asyncio.sleep(0.01)
        steady = max(stream.times[_BEGIN_CHUNKS] for stream in streams)
        await desk.ask(desk.prompt(long_tokens, f"{seed}/long"), 2, arrival)
        end = arrival.times[0] + _AFTER_S
        await asyncio.sleep(max(0.0, end + 0.05 - time.perf_counter()))
    finally:
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return figures(streams, arrival, steady, end)


def figures(streams: list[Stream], arrival: Stream, steady: float, end: float) -> dict[str, Any]:
    """In milliseconds, of each user in order. steady: when all were reading; end: of the time in which the arrival is felt."""
    rows = []
    for stream in streams:
        before, during = stream.gaps_s(steady, arrival.sent), stream.gaps_s(arrival.sent, end)
        rows.append((statistics.median(before) * 1e3, max(before) * 1e3, max(during) * 1e3))
    return {
        "median_gap_ms": [median for median, _, _ in rows],
        "largest_gap_ms": [largest for _, _, largest in rows],
        "stall_ms": max(largest - median for median, _, largest in rows),
        "control_ms": max(quiet - median for median, quiet, _ in rows),
        "ttft_ms": arrival.ttft_s * 1e3,
    }


async def cached(desk: Desk, tokens: int, repeats: int) -> dict[str, Any]:
    """The first of the same questions fills the cache and is not counted."""
    prompt, answers = desk.prompt(tokens, "cached"), [Stream() for _ in range(repeats + 1)]
    for answer in answers:
        await desk.ask(prompt, 17, answer)
        await asyncio.sleep(0.05)  # a person is no slower; the step that was in hand is over
    rows = [(answer.ttft_s * 1e3, statistics.median(answer.gaps_s(0.0, answer.times[-1])) * 1e3) for answer in answers[1:]]
    ttft, step = statistics.median(first for first, _ in rows), statistics.median(gap for _, gap in rows)
    worst = max(first / gap for first, gap in rows)
    found = answers[-1].cached_tokens
    return {"cached_tokens": found, "ttft_ms": ttft, "step_ms": step, "steps": ttft / step, "worst_steps": worst, "rows": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst of the repeats."""
    found = {}
    for name in ("stall_ms", "control_ms", "ttft_ms"):
        values = [row[name] for row in rows]
        found[name] = {"median": statistics.median(values), "worst": max(values)}
    found["median_gap_ms"] = statistics.median(gap for row in rows for gap in row["median_gap_ms"])
    return found


def measure(url: str, users: int, long_tokens: int, cached_tokens: int, repeats: int) -> dict[str, Any]:
    desk = Desk(url)
    asyncio.run(stall(desk, min(users, 2), long_tokens, "warm"))
    rows = [asyncio.run(stall(desk, users, long_tokens, str(number))) for number in range(repeats)]
    return {"stall": summary(rows) | {"rows": rows}, "cached": asyncio.run(cached(desk, cached_tokens, 2 * repeats))}


@click.command(context_settings={"show_default": True})
@click.argument("model", default="")
@click.option("--url", default="", help="A running server; without it one is started.")
@click.option("--users", type=click.IntRange(1, 4096), default=16)
@click.option("--long-tokens", type=click.IntRange(64), default=1024, help="Of the prompt that arrives.")
@click.option("--cached-tokens", type=click.IntRange(64), default=512, help="Of the prompt that is asked again.")
@click.option("--repeats", type=click.IntRange(1), default=8)
@click.option("--server-argument", multiple=True, help="Passed on to `braid serve`; repeatable.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(model: str, url: str, server_argument: tuple[str, ...], json_path: Path | None, **options: Any) -> None:
    """Measure the gaps that an arriving prompt makes, and the first token of a cached one."""
    sizes = [options[name] for name in ("users", "long_tokens", "cached_tokens", "repeats")]
    report: dict[str, Any] = {"machine": describe_machine(), "options": {"model": model, "server_argument": server_argument, **options}}
    if url:
        report |= measure(url, *sizes)
    else:
        with serving(model, list(server_argument)) as (address, _):
            report |= measure(address, *sizes)
    found, again = report["stall"], report["cached"]
    click.echo(f"{report['machine']['processor']}, commit {report['machine']['commit']}")
    click.echo(f"{options['users']} users, median gap {found['median_gap_ms']:.1f} ms; a prompt of {options['long_tokens']} tokens arrives")
    for name, words in (("stall_ms", "worst largest - median gap"), ("control_ms", "the same without it"), ("ttft_ms", "its first token")):
        click.echo(f"  {words:28} median {found[name]['median']:7.1f} ms, worst {found[name]['worst']:7.1f} ms")
    click.echo(
        f"{options['cached_tokens']} tokens asked again ({again['cached_tokens']} cached), one user: first token after "
        f"{again['ttft_ms']:.1f} ms, a step {again['step_ms']:.2f} ms: {again['steps']:.2f} steps (worst {again['worst_steps']:.2f})"
    )
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
