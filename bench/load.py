"""Load over HTTP, closed loop: so many users, each sends its next streamed chat request when the last one has ended.

    python -m bench.load --users 1 --users 16                starts `braid serve` itself, and probes the machine's limit in the same run
    python -m bench.load --url http://127.0.0.1:8000 ...      measures any OpenAI-style server
    python -m bench.load --users 16 --shared-prefix 512 --compare-prefix-cache

Requests and figures are those of `braid bench serve` (service/bench); this adds the server, and the ratio to the read limit: read
bandwidth over the bytes of the weights, which is the most tokens a second that one sequence can get when every weight is read once a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx

from bench.probe import describe_machine, read_bandwidth
from service.bench import run
from service.bench.options import Options


def load_of(users: int, requests_per_user: int, *, shared_prefix: int = 0, **options: Any) -> Options:
    """A closed loop whose answers have their full length."""
    prefix = {"dataset_name": "shared-prefix", "shared_prefix_len": shared_prefix} if shared_prefix else {}
    return Options(num_prompts=users * requests_per_user, max_concurrency=users, ignore_eos=True, warmups=0, **prefix, **options)


async def run_load(url: str, load: Options) -> dict[str, Any]:
    found, _ = await run.measure(replace(load, base_url=url))
    return found


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


def measure(url: str, loads: list[Options]) -> list[dict[str, Any]]:
    """Every load in turn, the first after a short warm-up. Each says things of its own, so that none is known from the one before."""
    first, *others = loads
    loads = [replace(first, warmups=min(first.num_prompts, 2)), *others]
    return [asyncio.run(run_load(url, replace(load, seed=load.seed + number))) for number, load in enumerate(loads)]


def weight_bytes_of(url: str) -> int:
    meta = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0].get("meta") or {}
    return int(meta.get("weight_bytes") or 0)


def print_table(title: str, rows: list[dict[str, Any]], limit: float) -> None:
    click.echo(f"\n{title}")
    click.echo(f"{'users':>6} {'out tok/s':>10} {'x limit':>8} {'TTFT p50':>10} {'TPOT p50':>10} {'cached':>8} {'failed':>7}")
    for row in rows:
        ratio = f"{row['output_throughput'] / limit:.2f}" if limit else "-"
        click.echo(
            f"{row['max_concurrency']:>6} {row['output_throughput']:>10.1f} {ratio:>8} {row['median_ttft_ms']:>7.1f} ms "
            f"{row['median_tpot_ms']:>7.2f} ms {row['cached_tokens_per_request']:>8.0f} {row['failed']:>7}"
        )
        for note in row["notes"]:
            click.echo(f"       {note}")


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
    told = {
        "random_input_len": options["prompt_tokens"],
        "random_output_len": options["output_tokens"],
        "shared_prefix": options["shared_prefix"],
        "seed": options["seed"],
        "think_time": options["think_s"],
    }
    loads = [load_of(count, options["requests_per_user"], **told) for count in users]
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
