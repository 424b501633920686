"""The console script `braid`: serve, deploy, pull, models, chat, plan, bench. Reads what a person typed, calls one function, prints what
came back.

Start-up is quick: each command imports what it needs, and only `plan` ever loads torch. Installed by pyproject as `service.cli:main`.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.catalog import CATALOG, Progress, Resolved, is_cached, resolve
from service.catalog import verify as verify_file
from service.errors import StartupError
from service.settings import DEFAULT_MODEL, DEFAULT_MODELS, ENVIRONMENT_PREFIX, Size, format_bytes, make_settings, serve_options

if TYPE_CHECKING:
    from service.deploy.plan import Plan

_CONTEXT: dict[str, Any] = {
    "auto_envvar_prefix": ENVIRONMENT_PREFIX,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
}


def _show_version(context: click.Context, option: click.Parameter, is_asked: bool) -> None:
    if not is_asked or context.resilient_parsing:
        return
    from importlib import metadata

    try:
        version = metadata.version("braid")
    except metadata.PackageNotFoundError:  # run from its sources
        version = "(not installed)"
    click.echo(f"braid {version}")
    context.exit()


class Commands(click.Group):
    """Shows our own errors as one line and ends with status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StartupError as error:
            raise click.ClickException(error.message) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version and exit.")
def main() -> None:
    """An inference server that speaks OpenAI's protocol.

    MODEL is a name of the catalog (see `braid models`), a folder with safetensors, a .gguf file, or hf:organisation/name.
    """


@main.command(context_settings=_CONTEXT, short_help="Serve models over HTTP.")
@serve_options
def serve(**values: Any) -> None:
    """Serve one or several models over HTTP; a request that names none gets the first that can do what it asks for.

    Without MODEL they are smollm2-135m-instruct, fetched on first use, and braid-nano, which ships with Braid and draws; where the first
    can't be fetched, braid-nano alone. A flag wins over the environment, that over the --config file.
    """
    settings = make_settings(values)
    models = _resolve_defaults() if settings.models == DEFAULT_MODELS else _resolve_all(settings.models)
    draft = _pull_one(settings.draft_model) if settings.draft_model else None
    from service.__main__ import main as run

    sys.exit(run(settings, models, draft))


def _deploy_option(*names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(*names, show_envvar=True, **{"show_default": True, **more})


@main.command(context_settings=_CONTEXT, short_help="Serve on many machines, with Ray Serve.")
@click.argument("flags", metavar="[-- FLAGS OF BRAID SERVE]", nargs=-1, type=click.UNPROCESSED)
@_deploy_option("--model", "models", multiple=True, show_default="those of braid serve", help="A model of every replica; repeatable.")
@_deploy_option("--replicas", default="1", help="How many, or MIN:MAX to let the load decide.")
@_deploy_option("--cpus", type=click.FloatRange(0.1), default=1.0, help="Cores of each replica.")
@_deploy_option("--gpus", type=click.FloatRange(0), default=0.0, help="GPUs of each replica.")
@_deploy_option("--host", default="127.0.0.1", help="Address that every node listens on.")
@_deploy_option("--port", type=click.IntRange(1, 65_535), default=8000, help="Port that every node listens on.")
@_deploy_option("--goal-requests", type=click.FloatRange(1), default=16.0, help="In flight in each replica; decides on their number.")
@_deploy_option("--max-requests", type=click.IntRange(1), default=96, help="Most requests that a replica takes at once; more wait.")
@_deploy_option("--max-queue", type=click.IntRange(1), default=1024, help="Most requests that wait at a gate; more get 429.")
@_deploy_option("--gates", type=click.IntRange(1), default=1, help="Processes that requests pass on their way to a replica.")
@_deploy_option("--calm", "calm_s", type=click.FloatRange(0), default=300.0, help="Seconds for which fewer must do before one is ended.")
@_deploy_option("--name", default="braid", help="Of the application.")
@_deploy_option("--address", default="auto", help="Of the Ray cluster; auto finds this machine's, local starts one.")
@_deploy_option(
    "--write",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    show_default="none",
    help="Write the file that `serve deploy` reads, run nothing.",
)
def deploy(flags: tuple[str, ...], models: tuple[str, ...], replicas: str, address: str, write: Path | None, **values: Any) -> None:
    """Run replicas of a server on a Ray cluster behind one address, until a signal ends them.

    Requests that begin alike go to the same replica while it is not overloaded. What stands after -- is passed on to `braid serve` in
    every replica. Needs braid[ray] on every node.
    """
    from service.deploy.plan import Plan, read_replicas, serve_arguments, serve_config

    low, high = read_replicas(replicas)
    plan = Plan(serve=(), low=low, high=high, **values)
    arguments = serve_arguments(models, flags, plan)
    serve.make_context("serve", list(arguments))  # a flag that no replica would take is told here
    plan = dataclasses.replace(plan, serve=arguments)
    if write is not None:
        import yaml

        text = yaml.safe_dump(serve_config(plan), sort_keys=False)
        if str(write) == "-":
            click.echo(text, nl=False)
        else:
            write.write_text(text, encoding="utf-8")
        return
    _run_on_ray(plan, address)


def _run_on_ray(plan: Plan, address: str) -> None:
    try:
        from service.deploy import cluster
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise StartupError("braid deploy needs Ray Serve: pip install 'braid[ray]', here and on every node") from None
    with _signals_as_event() as ended:
        cluster.connect(address)
        try:
            cluster.start(plan)
            click.echo(f"{plan.low} to {plan.high} replicas at http://{plan.host}:{plan.port}/v1", err=True)
            ended.wait()
        finally:
            cluster.stop()


@contextmanager
def _signals_as_event() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second ends the program as usual."""
    ended = threading.Event()
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def on_signal(number: int, frame: object) -> None:
        ended.set()
        for kind, usual in before.items():
            signal.signal(kind, usual)

    for kind in kinds:
        signal.signal(kind, on_signal)
    try:
        yield ended
    finally:
        for kind, usual in before.items():
            signal.signal(kind, usual)


@main.command("pull", context_settings=_CONTEXT, short_help="Fetch models into the cache.")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--verify", is_flag=True, help="Read cached files again and compare their checksums.", show_envvar=True)
def pull_command(models: tuple[str, ...], verify: bool) -> None:
    """Fetch models, by default those that are served by default, so that they can be served offline."""
    for name in models or DEFAULT_MODELS:
        entry = CATALOG.get(name)
        if verify and entry is not None and is_cached(entry) and not verify_file(entry):
            click.echo(f"{name}: the cached file is damaged; fetching it again", err=True)
        found = _pull_one(name)
        click.echo(f"{found.name}: {format_bytes(found.size)} at {found.path}")


@main.command("models", context_settings=_CONTEXT)
def models_command() -> None:
    """List the catalog: what is cached, sizes, licences."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("name", no_wrap=True), "cached", Column("size", no_wrap=True), "licence", "what it is")
    for entry in CATALOG.values():
        table.add_row(entry.name, "yes" if is_cached(entry) else "no", format_bytes(entry.total_size), entry.licence, entry.summary)
    Console().print(table)


@main.command(context_settings=_CONTEXT, short_help="Talk to a running server in the terminal.")
@click.option("--base-url", default="http://127.0.0.1:8000/v1", show_default=True, show_envvar=True, help="Of the server.")
@click.option("--model", default="", show_default="the server's first", show_envvar=True, help="Which of the server's models.")
@click.option("--system", default="", show_default="none", show_envvar=True, help="A system message.")
@click.option("--api-key", default="", show_default="none", show_envvar=True, help="A key that the server asks for.")
@click.option("--temperature", type=click.FloatRange(0, 2), show_default="the model's own", show_envvar=True, help="0 is greedy.")
@click.option("--max-tokens", type=click.IntRange(1), show_default="what the context leaves", show_envvar=True, help="Per answer.")
def chat(base_url: str, model: str, system: str, api_key: str, temperature: float | None, max_tokens: int | None) -> None:
    """Talk to a running server. /reset forgets, /system TEXT sets a system message, /quit ends; Ctrl-C stops an answer."""
    from service.terminal import ChatClient, talk

    sampling = {key: value for key, value in (("temperature", temperature), ("max_tokens", max_tokens)) if value is not None}
    with ChatClient(base_url, model, api_key, sampling) as client:
        talk(client, system)


@main.command(context_settings=_CONTEXT, short_help="Sizes of a model before loading it.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--memory", type=Size(0), default=0, show_default="half of what is free", show_envvar=True, help="For weights and K/V.")
@click.option(
    "--max-context", type=click.IntRange(0), default=0, show_default="the model's own", show_envvar=True, help="Tokens per sequence."
)
def plan(model: str, memory: int, max_context: int) -> None:
    """Show weights, K/V tokens and the greatest concurrency of a model on a CPU, from its description alone."""
    from service.footprint import print_plan

    print_plan(_pull_one(model), memory, max_context)


@main.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True})
def bench() -> None:
    """Measure a running server."""


def _goals(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    goals = {}
    for value in values:
        name, _, limit = value.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el") or not goals[name] > 0:
            raise click.BadParameter(f"{value!r} is not ttft, tpot or e2el with milliseconds, such as ttft:200")
    return goals


# Only the key comes from the environment: figures must not depend on a variable that somebody forgot.
@bench.command("serve", short_help="Load any OpenAI-style server over HTTP.")
@click.option("--base-url", default="http://127.0.0.1:8000", help="Of the server, http or https.")
@click.option("--endpoint", default="", show_default="/v1/chat/completions", help="Or /v1/completions; pictures have their own.")
@click.option("--model", default="", show_default="the server's first", help="Which of the server's models.")
@click.option(
    "--api-key", default="", show_default="none", envvar="BRAID_API_KEY", show_envvar=True, help="A key that the server asks for."
)
@click.option(
    "--dataset-name", type=click.Choice(("random", "shared-prefix", "multi-turn", "pictures")), default="random", help="What is sent."
)
@click.option("--num-prompts", type=click.IntRange(1), default=100, help="Requests, those of all turns together.")
@click.option("--random-input-len", type=click.IntRange(1), default=139, help="Tokens of a prompt, by the server's own count.")
@click.option("--random-output-len", type=click.IntRange(1), default=128, help="Tokens of an answer, at most.")
@click.option("--shared-prefix-len", type=click.IntRange(1), default=512, help="shared-prefix: tokens before them that all prompts share.")
@click.option("--num-turns", type=click.IntRange(1), default=4, help="multi-turn: requests of one conversation.")
@click.option("--think-time", type=click.FloatRange(0), default=0.0, help="Mean seconds a user pauses before a request.")
@click.option("--partial-images", type=click.IntRange(0, 3), default=2, help="pictures: previews of each.")
@click.option(
    "--request-rate", type=click.FloatRange(0, min_open=True), default=float("inf"), help="Arrivals a second; inf is a closed loop."
)
@click.option("--burstiness", type=click.FloatRange(0, min_open=True), default=1.0, help="Of arrivals: 1 is Poisson, less comes in bursts.")
@click.option("--max-concurrency", type=click.IntRange(1), show_default="all at once", help="Requests in flight, at most.")
@click.option("--ignore-eos/--no-ignore-eos", default=False, help="Answers go on to their full length; not every server can.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, help="0 is greedy.")
@click.option("--warmups", type=click.IntRange(0), default=1, help="Short requests before, which are not measured.")
@click.option("--seed", default=0, help="Of what is sent and when.")
@click.option("--goodput", multiple=True, callback=_goals, metavar="KEY:MS", show_default="none", help="ttft, tpot or e2el; repeatable.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), show_default="none", help="Write all figures here.")
@click.option("--save-detailed", is_flag=True, help="With the lengths and times of every request.")
def bench_serve(json_path: Path | None, save_detailed: bool, **values: Any) -> None:
    """Send requests to a server and report throughput, times to the first token, and times between tokens.

    The options and figures are those of `vllm bench serve`. Status 1 when no request was answered.
    """
    from service.bench.options import Options
    from service.bench.run import run

    if not run(Options(**values), json_path, saves_details=save_detailed):
        sys.exit(1)


def _pull_one(model: str) -> Resolved:
    with _progress_bar() as progress:
        return resolve(model, progress)


def _resolve_defaults() -> list[Resolved]:
    """Those that are here or can be fetched; without a network that is what ships. Raises: StartupError when none is left."""
    found, problems = list[Resolved](), list[StartupError]()
    for name in DEFAULT_MODELS:
        try:
            found.append(_pull_one(name))
        except StartupError as error:
            problems.append(error)
            click.echo(f"{error.message}; going on without {name}", err=True)
    if not found:
        raise problems[0]
    return found


def _resolve_all(models: tuple[str, ...]) -> list[Resolved]:
    """Raises: StartupError when two would answer to one name."""
    found = [_pull_one(model) for model in models]
    names = [each.name for each in found]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise StartupError(f"two models would be called {double[0]}; rename a file or a folder, or leave one out")
    return found


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on stderr that appears with the first report; where stderr is no terminal, a line for each thing done."""
    shown: dict[str, Any] = {}
    if not sys.stderr.isatty():

        def report_line(doing: str, fraction: float) -> None:
            if doing not in shown:
                shown[doing] = True
                click.echo(doing, err=True)

        yield report_line
        return

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def report(doing: str, fraction: float) -> None:
            if doing not in shown:
                shown[doing] = bar.add_task(doing, total=1.0)
            bar.update(shown[doing], completed=fraction)

        yield report


if __name__ == "__main__":
    main()
