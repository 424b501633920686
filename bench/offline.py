"""Throughput without HTTP: many requests of random lengths, all there at once, through the engine's lane in this process.

    python -m bench.offline --json offline.json          256 requests of 100 to 1024 tokens each way: minutes on a CPU
    python -m bench.offline --requests 16 --max-len 200

The requests are those of nano-vllm's bench.py (same seed, same calls of `random`, so the same ids and lengths): random ids, temperature
0.6, every answer to its full length.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.lane import Loop, load_lane
from bench.probe import describe_machine
from service.engine.messages import Load
from service.errors import StartupError
from service.runner.load import Loaded
from service.scheduling.sampling import SamplingParams

MODEL = "smollm2-135m-instruct"
TEMPERATURE = 0.6
_MOST_ID = 10_000  # as in nano-vllm


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: the ids of its prompt, and how many are drawn."""

    prompt: tuple[int, ...]
    num_drawn: int


def requests_of(count: int, least: int, most: int, vocab_size: int, seed: int) -> list[Asked]:
    """Lengths of prompts and answers uniform in least ... most."""
    source = random.Random(seed)
    last = min(_MOST_ID, vocab_size - 1)
    prompts = [tuple(source.randint(0, last) for _ in range(source.randint(least, most))) for _ in range(count)]
    return [Asked(prompt, source.randint(least, most)) for prompt in prompts]


def run(loaded: Loaded, message: Load, requests: list[Asked]) -> dict[str, Any]:
    """Figures of all requests together. mean_batch: ids drawn in a step. busy: share of the time that steps take, the rest is this loop."""
    loop = Loop(loaded, message)
    start = time.perf_counter()
    for number, asked in enumerate(requests):
        # Without stop ids nothing ends an answer but its length.
        loop.add(str(number), asked.prompt, SamplingParams(asked.num_drawn, temperature=TEMPERATURE, seed=number))
    while loop.scheduler.has_work:
        loop.step()
    seconds = time.perf_counter() - start
    num_drawn = sum(map(len, loop.ids.values()))
    if num_drawn != sum(asked.num_drawn for asked in requests):
        raise click.ClickException("an answer ended before its full length")
    num_read = sum(len(asked.prompt) for asked in requests)
    return {
        "requests": len(requests),
        "prompt_tokens": num_read,
        "output_tokens": num_drawn,
        "seconds": seconds,
        "output_throughput": num_drawn / seconds,
        "total_throughput": (num_read + num_drawn) / seconds,
        "steps": len(loop.durations),
        "mean_batch": num_drawn / len(loop.durations),
        "busy": sum(loop.durations) / seconds,
        "preemptions": loop.scheduler.stats.preemptions,
    }


@click.command(context_settings={"show_default": True})
@click.option("--model", default=MODEL, help="A name of the catalog, a folder or a .gguf file.")
@click.option("--requests", "count", type=click.IntRange(1), default=256)
@click.option("--min-len", type=click.IntRange(1), default=100, help="Least tokens of a prompt and of an answer.")
@click.option("--max-len", type=click.IntRange(1), default=1024, help="Most tokens of a prompt and of an answer.")
@click.option("--max-sequences", type=click.IntRange(1, 4096), default=64, help="That run at once, as of `braid serve`.")
@click.option("--seed", default=0)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(model: str, count: int, min_len: int, max_len: int, max_sequences: int, seed: int, json_path: Path | None) -> None:
    """Measure the engine's throughput."""
    if min_len > max_len:
        raise click.UsageError(f"--min-len {min_len} is more than --max-len {max_len}")
    try:
        loaded, message = load_lane(model, max_sequences=max_sequences)
    except StartupError as error:
        raise click.ClickException(error.message) from error
    if not loaded.info.can_generate or 2 * max_len > loaded.info.max_context:
        raise click.UsageError(f"{model} has to generate, within its {loaded.info.max_context} tokens: give a smaller --max-len")
    found = run(loaded, message, requests_of(count, min_len, max_len, loaded.info.vocab_size, seed))
    click.echo(f"{found['requests']} requests, {found['prompt_tokens']} tokens of prompts, {found['output_tokens']} of answers")
    click.echo(f"{found['seconds']:.1f} s, {found['output_throughput']:.1f} output tokens/s, {found['mean_batch']:.1f} drawn a step")
    if json_path is not None:
        options = {"model": model, "min_len": min_len, "max_len": max_len, "max_sequences": max_sequences, "seed": seed}
        report = {"machine": describe_machine(), "options": options, "figures": found}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
