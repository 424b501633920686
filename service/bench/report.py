"""What answers come to: figures under the names of `vllm bench serve`, and their table. No requests, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

import click

from service.bench.options import Options, told_rate
from service.bench.request import Answer

TIMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (excl. 1st token)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_MOST_ERRORS = 3


def figures(answers: Sequence[Answer], duration_s: float, options: Options) -> dict[str, Any]:
    """Times in milliseconds, throughput a second, lengths in tokens. Percentiles and deviation as numpy's, which vLLM's are.

    tpot of an answer is (e2el - ttft) / (tokens - 1); answers of one token have none. itl is the gap between two chunks of an answer, all
    answers together: where a server sends several tokens in one chunk it is the gap of chunks, and its mean is not tpot.
    """
    good = [answer for answer in answers if answer.error is None]
    prompt_tokens, output_tokens = sum(each.prompt_tokens for each in good), sum(each.output_tokens for each in good)
    draws = options.dataset_name == "pictures"
    times = {
        "ttft": [each.ttft_s for each in good],
        "tpot": [] if draws else [each.tpot_s for each in good if each.output_tokens > 1],
        "itl": [gap for each in good for gap in each.gaps_s],
        "e2el": [each.e2el_s for each in good],
    }
    rates = {
        "request_throughput": len(good),
        "request_goodput": sum(_is_good(each, options.goodput) for each in good) if options.goodput else None,
        "output_throughput": output_tokens,
        "total_token_throughput": prompt_tokens + output_tokens,
    }
    return {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        **{name: None if count is None else count / duration_s for name, count in rates.items()},
        **{key: value for name, values in times.items() for key, value in _spread(name, values).items()},
        "max_concurrency": options.max_concurrency,
        "request_rate": told_rate(options.request_rate),
        "cached_tokens_per_request": fmean(each.cached_tokens for each in good) if good else 0.0,
        "num_without_usage": sum(not each.has_usage for each in good),
        "errors": sorted({each.error for each in answers if each.error is not None})[:_MOST_ERRORS],
    }


def remarks(answers: Sequence[Answer], options: Options) -> list[str]:
    """Where a run was not what its options say."""
    good, found = [each for each in answers if each.error is None], []
    if num_counted := sum(not each.has_usage for each in good):
        found.append(f"{num_counted} answers came without usage: chunks are counted as tokens, prompts as they were meant to be")
    counted = [each for each in good if each.has_usage and options.dataset_name != "pictures"]
    wanted = options.random_input_len + (options.shared_prefix_len if options.dataset_name == "shared-prefix" else 0)
    lengths = [] if options.dataset_name == "multi-turn" else [each.prompt_tokens for each in counted]
    if any(length != wanted for length in lengths):
        found.append(f"prompts had {_range(lengths)} tokens and not {wanted}")
    lengths = [each.output_tokens for each in counted if options.ignore_eos]
    if any(length != options.random_output_len for length in lengths):
        found.append(f"answers had {_range(lengths)} tokens and not {options.random_output_len}")
    return found


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def details(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Every request's own, in the order in which they ended; seconds, start_times since the first was sent."""
    first = min((each.sent for each in answers), default=0.0)
    return {
        "input_lens": [each.prompt_tokens for each in answers],
        "output_lens": [each.output_tokens for each in answers],
        "cached_lens": [each.cached_tokens for each in answers],
        "start_times": [each.sent - first for each in answers],
        "ttfts": [each.ttft_s if each.error is None else None for each in answers],
        "itls": [each.gaps_s for each in answers],
        "e2els": [each.e2el_s if each.error is None else None for each in answers],
        "request_errors": [each.error for each in answers],
    }


def _is_good(answer: Answer, goals: Mapping[str, float]) -> bool:
    taken = {"ttft": answer.ttft_s, "tpot": answer.tpot_s, "e2el": answer.e2el_s}
    return all(taken[name] * 1e3 <= goal_ms for name, goal_ms in goals.items())


def _spread(name: str, values_s: Sequence[float]) -> dict[str, float]:
    """All are 0 where there is nothing, as vLLM has it."""
    values = sorted(value * 1e3 for value in values_s) or [0.0]
    found = {"mean": fmean(values), "median": percentile(values, 50), "std": pstdev(values)}
    found |= {"p95": percentile(values, 95), "p99": percentile(values, 99)}
    return {f"{key}_{name}_ms": value for key, value in found.items()}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two values next to it, linearly."""
    place = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def print_report(found: Mapping[str, Any], options: Options, notes: Sequence[str] = ()) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    draws = options.dataset_name == "pictures"
    table = Table(title="Serving benchmark result", box=box.HORIZONTALS, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, value in _totals(found, draws=draws).items():
        if value is not None:
            table.add_row(label, str(value) if isinstance(value, int | str) else f"{value:.2f}")
    names = {**TIMES, "ttft": "Time to first preview", "itl": "Between previews", "e2el": "Time of a picture"} if draws else TIMES
    for name, title in names.items():
        if not found["completed"] or (draws and name == "tpot"):
            continue
        table.add_section()
        table.add_row(f"[bold]{title}")
        for key, word in (("mean", "Mean"), ("median", "Median"), ("std", "Std"), ("p95", "P95"), ("p99", "P99")):
            table.add_row(f"{word} {name.upper()} (ms)", f"{found[f'{key}_{name}_ms']:.2f}")
    Console().print(table)
    for note in notes:
        click.echo(f"note: {note}")
    for error in found["errors"]:
        click.echo(f"error: {error}")


def _totals(found: Mapping[str, Any], *, draws: bool) -> dict[str, Any]:
    return {
        "Successful requests": found["completed"],
        "Failed requests": found["failed"],
        "Maximum request concurrency": found["max_concurrency"],
        "Request rate configured (RPS)": found["request_rate"],
        "Benchmark duration (s)": found["duration"],
        "Total input tokens": found["total_input_tokens"],
        "Total generated tokens": found["total_output_tokens"],
        "Cached input tokens per request": found["cached_tokens_per_request"],
        "Pictures per second" if draws else "Request throughput (req/s)": found["request_throughput"],
        "Request goodput (req/s)": found["request_goodput"],
        "Output token throughput (tok/s)": found["output_throughput"],
        "Total token throughput (tok/s)": found["total_token_throughput"],
    }
