"""Load over HTTP, closed loop: so many users, each sends its next streamed chat request when the last one has ended.

    python -m bench.load --users 1 16                        starts `braid serve` itself, and probes the machine's limit in the same run
    python -m bench.load --url http://127.0.0.1:8000 ...      measures any OpenAI-style server
    python -m bench.load --users 16 --shared-prefix 512 --compare-prefix-cache

Reports output tokens a second, TTFT and TPOT, and the ratio to the read limit: read bandwidth over the bytes of the weights, which is
the most tokens a second that one sequence can get when every weight is read once a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import httpx

from bench.probe import describe_machine, read_bandwidth

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work government number night point home water room mother area money story fact month lot right"
).split()


@dataclass
class Answer:
    """What one request measured. Times in seconds since it was sent."""

    sent: float
    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.chunk_times[0] - self.sent

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.chunk_times[-1] - self.chunk_times[0]) / max(self.output_tokens - 1, 1)


class Text:
    """Prompts of an exact number of tokens: the server's own count tells how many words that is."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self.client = client
        self.model = model

    async def count(self, messages: list[dict[str, str]]) -> int:
        body = {"model": self.model, "messages": messages, "max_tokens": 1}
        answer = (await self.client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return int(answer["usage"]["prompt_tokens"])

    async def words_for(self, tokens: int, role: str = "user") -> int:
        """How many of WORDS fill a prompt of `tokens` tokens with one message of that role beside a one-word user message."""
        rest = [{"role": "user", "content": "time"}] if role == "system" else []
        few = await self.count([{"role": role, "content": words(random.Random(0), 20)}, *rest])
        return max(1, 20 + tokens - few)


def words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(count))


async def ask(url: httpx.URL, body: dict[str, Any]) -> Answer:
    """One streamed request, over a plain socket: through httpx a token cost the client 0.27 ms, which on a small machine comes out of
    the server's time. Only the last chunks are parsed."""
    answer = Answer(time.perf_counter())
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    tail = b""
    try:
        reader, writer = await asyncio.open_connection(url.host, url.port or 80)
        try:
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            status = await reader.readline()
            if status.split()[1:2] != [b"200"]:
                answer.error = (status + await reader.read()).decode()[-300:]
                return answer
            while chunk := await reader.read(65_536):
                # The first chunk may carry only the role; a token is there once some content is not empty.
                if answer.chunk_times or b'"content":"' in chunk.replace(b'"content":""', b""):
                    answer.chunk_times.append(time.perf_counter())
                tail = (tail + chunk)[-4000:]
        finally:
            writer.close()
    except OSError as error:
        answer.error = repr(error)
        return answer
    for line in tail.decode().splitlines():
        if line.startswith("data: {") and '"usage":{' in line:
            usage = json.loads(line[6:])["usage"]
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if not answer.output_tokens:
        answer.error = "the stream ended without usage"
    return answer


@dataclass(frozen=True)
class Load:
    users: int
    requests_per_user: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix: int
    seed: int
    think_s: float = 0.0  # mean of the pause before each request, exponentially distributed


async def run_load(url: str, load: Load) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=load.users + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        text = Text(client, model)
        num_words = await text.words_for(load.prompt_tokens)
        system = words(random.Random(load.seed), await text.words_for(load.shared_prefix, "system")) if load.shared_prefix else ""
        answers: list[Answer] = []

        async def user(number: int) -> None:
            for turn in range(load.requests_per_user):
                source = random.Random(f"{load.seed}/{load.output_tokens}/{number}/{turn}")  # the warm-up asks other things
                await asyncio.sleep(source.expovariate(1 / load.think_s) if load.think_s else 0)
                messages = [{"role": "user", "content": words(source, num_words)}]
                if system:
                    messages.insert(0, {"role": "system", "content": system})
                body = {"model": model, "messages": messages, "max_tokens": load.output_tokens, "temperature": 0, "stream": True}
                body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
                answers.append(await ask(client.base_url, body))

        start = time.perf_counter()
        await asyncio.gather(*(user(number) for number in range(load.users)))
        elapsed = time.perf_counter() - start
    return summarise(answers, elapsed, load)


def summarise(answers: list[Answer], elapsed: float, load: Load) -> dict[str, Any]:
    good = [answer for answer in answers if answer.error is None]
    errors = sorted({answer.error for answer in answers if answer.error is not None})

    def spread(values: list[float]) -> dict[str, float]:
        if not values:
            return {}
        ordered = sorted(values)
        return {
            "mean": statistics.fmean(values) * 1e3,
            "p50": statistics.median(values) * 1e3,
            "p99": ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))] * 1e3,
        }

    return {
        "users": load.users,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": errors[:3],
        "duration_s": elapsed,
        "prompt_tokens_per_request": statistics.fmean([a.prompt_tokens for a in good]) if good else 0,
        "cached_tokens_per_request": statistics.fmean([a.cached_tokens for a in good]) if good else 0,
        "output_tokens": sum(a.output_tokens for a in good),
        "output_throughput": sum(a.output_tokens for a in good) / elapsed,
        "ttft_ms": spread([a.ttft_s for a in good]),
        "tpot_ms": spread([a.tpot_s for a in good]),
    }


@contextlib.contextmanager
def serving(model: str, arguments: list[str]) -> Iterator[tuple[str, float]]:
    """`braid serve` on a free port: its address, and the seconds from start to ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "serve",
        *([model] if model else []),
        "--port",
        str(port),
        "--log-level",
        "warning",
        *arguments,
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        while True:
            if server.poll() is not None:
                raise click.ClickException(f"the server ended with status {server.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                    break
            time.sleep(0.02)
        yield url, time.perf_counter() - start
    finally:
        server.terminate()
        server.wait(60)


def measure(url: str, loads: list[Load]) -> list[dict[str, Any]]:
    """A warm-up of one short round, then every load in turn."""
    first = loads[0]
    asyncio.run(run_load(url, replace(first, users=min(first.users, 2), requests_per_user=1, output_tokens=8, think_s=0.0)))
    return [asyncio.run(run_load(url, load)) for load in loads]


def weight_bytes_of(url: str) -> int:
    meta = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0].get("meta") or {}
    return int(meta.get("weight_bytes") or 0)


def print_table(title: str, rows: list[dict[str, Any]], limit: float) -> None:
    click.echo(f"\n{title}")
    click.echo(f"{'users':>6} {'out tok/s':>10} {'x limit':>8} {'TTFT p50':>10} {'TPOT p50':>10} {'cached':>8} {'failed':>7}")
    for row in rows:
        ratio = f"{row['output_throughput'] / limit:.2f}" if limit else "-"
        ttft, tpot = row["ttft_ms"].get("p50", 0), row["tpot_ms"].get("p50", 0)
        click.echo(
            f"{row['users']:>6} {row['output_throughput']:>10.1f} {ratio:>8} {ttft:>7.1f} ms {tpot:>7.2f} ms "
            f"{row['cached_tokens_per_request']:>8.0f} {row['failed']:>7}"
        )


@click.command(context_settings={"show_default": True})
@click.argument("model", default="")
@click.option("--url", default="", help="A running server; without it one is started.")
@click.option("--users", multiple=True, type=click.IntRange(1, 4096), default=(1, 16), help="Concurrent users; repeatable.")
@click.option("--requests", "requests_per_user", type=click.IntRange(1), default=4, help="Requests each user sends, one after another.")
@click.option("--prompt-tokens", type=click.IntRange(8), default=139)
@click.option("--output-tokens", type=click.IntRange(2), default=128)
@click.option("--shared-prefix", type=click.IntRange(0), default=0, help="Tokens of a system prompt that all users share.")
@click.option("--think-time", "think_s", type=click.FloatRange(0), default=0.0, help="Mean seconds a user waits before each request.")
@click.option("--compare-prefix-cache", is_flag=True, help="Run everything again with --no-prefix-cache.")
@click.option("--server-argument", multiple=True, help="Passed on to `braid serve`; repeatable.")
@click.option("--seed", default=1)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(model: str, url: str, users: tuple[int, ...], json_path: Path | None, **options: Any) -> None:
    """Measure chat requests over HTTP."""
    shape = (
        options["requests_per_user"],
        options["prompt_tokens"],
        options["output_tokens"],
        options["shared_prefix"],
        options["seed"],
        options["think_s"],
    )
    loads = [Load(count, *shape) for count in users]
    report: dict[str, Any] = {"machine": describe_machine(), "options": {"model": model, "users": users, **options}}
    before = read_bandwidth()
    arguments = list(options["server_argument"])
    if url:
        report["runs"] = {"server": measure(url, loads)}
        weight_bytes = weight_bytes_of(url)
    else:
        with serving(model, arguments) as (address, ready_s):
            report["ready_s"] = ready_s
            weight_bytes = weight_bytes_of(address)
            report["runs"] = {"default": measure(address, loads)}
        if options["compare_prefix_cache"]:
            with serving(model, [*arguments, "--no-prefix-cache"]) as (address, _):
                report["runs"]["no_prefix_cache"] = measure(address, loads)
    after = read_bandwidth()
    limit = (before + after) / 2 / weight_bytes if weight_bytes else 0.0
    report |= {"read_bandwidth": {"before": before, "after": after}, "weight_bytes": weight_bytes, "limit_tokens_per_s": limit}
    click.echo(f"{report['machine']['processor']}, {report['machine']['threads']} threads, commit {report['machine']['commit']}")
    click.echo(
        f"read {before / 1e9:.1f} GB/s before, {after / 1e9:.1f} after; weights {weight_bytes / 1e6:.1f} MB; limit {limit:.0f} tokens/s"
    )
    if "ready_s" in report:
        click.echo(f"start to ready: {report['ready_s']:.2f} s")
    for name, rows in report["runs"].items():
        print_table(name, rows, limit)
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
