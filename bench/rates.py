"""Latency against the rate of requests: Poisson arrivals at one rate after another, until the server is far behind.

    python -m bench.rates --json rates.json --plot rates.png          starts `braid serve`; --url measures another server

Each rate is a run of `braid bench serve` with chat requests of 139 + 128 tokens. Goodput counts the requests that kept both goals.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import click

from bench.load import serving
from bench.probe import describe_machine
from service.bench.options import Options
from service.bench.run import measure

RATES = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
GOALS = {"ttft": 500.0, "tpot": 50.0}  # milliseconds: what people who read along do not notice


@click.command(context_settings={"show_default": True})
@click.argument("model", default="smollm2-135m-instruct")
@click.option("--url", default="", help="A running server; without it one is started.")
@click.option(
    "--rate", "rates", multiple=True, type=click.FloatRange(0, min_open=True), default=RATES, help="Requests a second; repeatable."
)
@click.option("--seconds", type=click.FloatRange(1), default=15.0, help="Of arrivals at each rate.")
@click.option("--input-len", type=click.IntRange(1), default=139)
@click.option("--output-len", type=click.IntRange(2), default=128)
@click.option("--server-argument", multiple=True, help="Passed on to `braid serve`; repeatable.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
def main(model: str, url: str, rates: tuple[float, ...], json_path: Path | None, plot_path: Path | None, **options: Any) -> None:
    """Measure latency at several rates of requests."""
    machine = describe_machine()
    with contextlib.ExitStack() as ends:
        address = url or ends.enter_context(serving(model, ["--no-prefix-cache", *options["server_argument"]]))[0]
        rows = [run_at(address, rate, seed, options) for seed, rate in enumerate(rates)]
    if plot_path is not None:
        plot(rows, f"{machine['processor']}, {machine['threads']} threads, commit {machine['commit']}", plot_path)
    if json_path is not None:
        told = {name: options[name] for name in ("seconds", "input_len", "output_len", "server_argument")}
        json_path.write_text(json.dumps({"machine": machine, "options": told, "goals": GOALS, "rates": rows}, indent=1) + "\n")


def run_at(url: str, rate: float, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    asked = Options(
        base_url=url,
        num_prompts=max(8, round(rate * options["seconds"])),
        random_input_len=options["input_len"],
        random_output_len=options["output_len"],
        request_rate=rate,
        ignore_eos=True,
        seed=seed,
        goodput=GOALS,
    )
    found, _ = asyncio.run(measure(asked))
    click.echo(
        f"{rate:5.1f}/s: TTFT {found['median_ttft_ms']:7.1f} ms (p95 {found['p95_ttft_ms']:7.1f}), TPOT {found['median_tpot_ms']:6.2f} ms "
        f"(p95 {found['p95_tpot_ms']:6.2f}), goodput {found['request_goodput']:.2f}/s, {found['output_throughput']:.0f} tokens/s"
    )
    return {"rate": rate, **found}


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    rates = [row["rate"] for row in rows]
    for index, (name, label) in enumerate((("ttft", "time to the first token, ms"), ("tpot", "time per token, ms"))):
        axes = figure.add_subplot(1, 3, index + 1)
        for kind in ("median", "p95"):
            axes.plot(rates, [row[f"{kind}_{name}_ms"] for row in rows], marker=".", label=kind)
        axes.axhline(GOALS[name], color="gray", linewidth=0.8, linestyle="--")
        axes.set(xlabel="requests a second", title=label, yscale="log")
    axes = figure.add_subplot(1, 3, 3)
    axes.plot(rates, [row["request_goodput"] for row in rows], marker=".", label="goodput")
    axes.plot(rates, [row["request_throughput"] for row in rows], marker=".", label="throughput")
    axes.set(xlabel="requests a second", title="answered a second")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
