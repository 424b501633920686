"""Braid beside other servers on this machine's CPU: the same model, the same requests over HTTP, in turns.

    python -m bench.peers install llama-server openvino      each into an environment of its own, from the registry that pip uses
    python -m bench.peers run --rounds 2 --json peers.json
    python -m bench.peers table peers.json                   the table again, from the raw figures

In every round each server is started once and gets every load. The machine is probed before and after each run, and a run between two
probes that differ is void: it is measured again, and its figures are kept but not counted. How a peer is started stands in `peer_list`,
how its weights are made in `peer_weights`; docs/peers.md says what is fair and what is not. Long, because install, run and table are one
command whose parts share its few plain values.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx

from bench.peer_list import BRAID, BRAID_INT4, KITS, PEERS, TORCH, USUAL_PEERS, Kit, Launch, Peer, braid_peer
from bench.peer_table import Load, Run, read_runs, shortfall, table, tell
from bench.peer_weights import prepare
from bench.probe import arithmetic_rate, describe_machine, read_bandwidth
from service.catalog import cache_folder, resolve

BENCH = [sys.executable, "-m", "service.cli", "bench", "serve"]
MOST_TRIES = 3
START_S, RUN_S, STOP_S = 600.0, 1800.0, 30.0
SPARE_TOKENS = 128  # of a sequence's room, beyond prompt and answer
_WORDS_SHOWN = 600  # of a log, in an error


@dataclass(frozen=True)
class Server:
    """endpoint: that is asked, "" for chats."""

    peer: Peer
    launch: Launch
    endpoint: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.launch.port}"

    @property
    def model(self) -> str:
        return str(self.launch.weights) if self.peer.is_named_by_path else self.launch.model

    @property
    def command(self) -> list[str]:
        return self.peer.command(self.launch)


def probe() -> dict[str, float]:
    return {"read_bandwidth": read_bandwidth(), "arithmetic_rate": arithmetic_rate()}


def told(word: str) -> str:
    """A word of a command without the folders that are this machine's alone."""
    return Path(word).name if word.startswith("/") else word


def install_commands(kit: Kit, folder: Path, torch: str) -> list[list[str]]:
    """All packages in one call, so that the pinned torch is the one that the others get."""
    python = str(folder / "bin" / "python")
    wanted = [*([f"torch=={torch}"] if kit.has_torch else []), *kit.requirements]
    commands = [[sys.executable, "-m", "venv", str(folder)], [python, "-m", "pip", "install", *wanted]]
    return [*commands, [python, *kit.last]] if kit.last else commands


@contextlib.contextmanager
def started(server: Server, log: Path) -> Iterator[float]:
    """The server while it runs; gives the seconds from start to ready. Raises: RuntimeError when it ends or does not become ready."""
    start = time.perf_counter()
    with log.open("wb") as output:
        # A session of its own: some servers start processes that would outlive them.
        process = subprocess.Popen(
            server.command, stdout=output, stderr=output, env={**os.environ, **server.peer.variables}, start_new_session=True
        )
    try:
        while not _is_ready(f"{server.url}{server.peer.ready}"):
            if process.poll() is not None:
                said = log.read_text(encoding="utf-8", errors="replace")[-_WORDS_SHOWN:]
                raise RuntimeError(f"the server ended with status {process.returncode}: {said}")
            if time.perf_counter() - start > START_S:
                raise RuntimeError(f"the server was not ready after {START_S:.0f} s")
            time.sleep(0.1)
        yield time.perf_counter() - start
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).status_code == 200
    return False


def bench_command(server: Server, load: Load, seed: int, path: Path) -> list[str]:
    return [
        *(*BENCH, "--base-url", server.url, "--model", server.model, "--dataset-name", "random"),
        *("--random-input-len", str(load.input_len), "--random-output-len", str(load.output_len)),
        *("--num-prompts", str(load.prompts), "--max-concurrency", str(load.users)),
        *("--ignore-eos", "--temperature", "0", "--seed", str(seed), "--json", str(path)),
        *(("--endpoint", server.endpoint) if server.endpoint else ()),
    ]


def bench(server: Server, load: Load, seed: int) -> dict[str, Any]:
    """The figures of one load. Raises: RuntimeError when the load generator fails."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        try:
            done = subprocess.run(bench_command(server, load, seed, path), capture_output=True, text=True, check=False, timeout=RUN_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {RUN_S:.0f} s") from None
        if done.returncode or not path.is_file():
            said = (done.stderr or done.stdout)[-_WORDS_SHOWN:]
            raise RuntimeError(f"the load generator ended with status {done.returncode}: {said}")
        figures: dict[str, Any] = json.loads(path.read_text())
        return figures


def measure(server: Server, loads: Sequence[Load], round_number: int) -> Iterator[Run]:
    """Every load on a server that runs, each until its run is not void, three times at most. A seed belongs to round, load and attempt: no
    prompt comes twice, and all servers get the same ones. Raises: RuntimeError when not even a warm-up succeeds."""
    seed = 10_000 * round_number
    users = min(4, max(load.users for load in loads))
    bench(server, Load(users, users, loads[0].input_len, 16), seed + 9_999)
    before = probe()
    for index, load in enumerate(loads):
        for attempt in range(MOST_TRIES):
            run = Run(round_number, server.peer.name, load, attempt)
            try:
                run.figures = bench(server, load, seed + 100 * index + attempt)
                run.failed = shortfall(run.figures, load)
            except RuntimeError as error:
                run.failed = str(error)
            after = probe()
            run.probes, before = [before, after], after
            yield run
            if run.failed or not run.is_void:
                break


def loads_for(users: Sequence[int], requests_per_user: int, prefill: int) -> list[Load]:
    """requests_per_user 0: three where one user asks, whose figure is noisy, and two elsewhere, so that a slow server takes minutes."""
    per_user = {count: requests_per_user or (3 if count == 1 else 2) for count in users}
    return [Load(count, count * each, 139, 128) for count, each in per_user.items()] + ([Load(1, 3, prefill, 2)] if prefill else [])


def find_servers(names: Sequence[str], folder: Path, launch: Launch, arguments: tuple[str, ...]) -> tuple[list[Server], dict[str, str]]:
    """Braid and those peers that are installed, with weights made where there are none yet; and why the others are not among them.
    launch: without program and port; its weights are Braid's own. Mutates: the folder."""
    own = replace(launch, program=Path(sys.executable))
    servers = [Server(braid_peer(BRAID, arguments), own), Server(braid_peer(BRAID_INT4, (*arguments, "--dtype", "int4")), own)]
    missing = {}
    for peer in (PEERS[name] for name in names):
        environment = folder / peer.kit.name
        program = peer.kit.find(environment)
        if program is None:
            missing[peer.name] = f"is not installed: python -m bench.peers install {peer.kit.name}"
            continue
        try:
            weights = prepare(peer.weights, environment, launch.weights, folder / "weights")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            missing[peer.name] = f"has no weights: {error}"
            continue
        servers.append(Server(peer, replace(launch, program=program, weights=weights)))
    return servers, missing


def run_rounds(servers: Sequence[Server], loads: Sequence[Load], rounds: int, logs: Path) -> Iterator[Run | dict[str, Any]]:
    """Runs as they are made, and what became of each start. Each round begins with another server."""
    for number in range(rounds):
        first = number % len(servers)
        for waiting in (*servers[first:], *servers[:first]):
            server = replace(waiting, launch=replace(waiting.launch, port=free_port()))
            start: dict[str, Any] = {"round": number, "server": server.peer.name, "command": [told(word) for word in server.command]}
            try:
                with started(server, logs / f"{server.peer.name}.log") as ready_s:
                    yield {**start, "ready_s": ready_s}
                    yield from measure(server, loads, number)
            except RuntimeError as error:
                yield {**start, "failed": str(error)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@click.group()
def main() -> None:
    """Compare Braid with other servers on a CPU."""


peers_folder = click.option(
    "--peers-folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: cache_folder() / "peers",
    show_default="peers in Braid's cache folder",
    help="Environments and weights of the peers.",
)


@main.command(context_settings={"show_default": True})
@click.argument("kits", nargs=-1, required=True, type=click.Choice(list(KITS)))
@click.option("--torch", default=TORCH, help="Version for those that need it.")
@peers_folder
def install(kits: tuple[str, ...], torch: str, peers_folder: Path) -> None:
    """Install peers with pip, each into an environment of its own."""
    peers_folder.mkdir(parents=True, exist_ok=True)
    for name in kits:
        kit = KITS[name]
        for command in install_commands(kit, peers_folder / name, torch):
            click.echo(shlex.join(command))
            if status := subprocess.run(command, check=False, env={**os.environ, **kit.variables}).returncode:
                raise click.ClickException(f"{name} was not installed (status {status})")


@main.command(context_settings={"show_default": True})
@click.option("--users", multiple=True, type=click.IntRange(1, 256), default=(1, 4, 16, 32), help="Concurrent users; repeatable.")
@click.option("--peers", "names", multiple=True, type=click.Choice(list(PEERS)), default=USUAL_PEERS, help="Repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=3)
@click.option("--requests", type=click.IntRange(0), default=0, show_default="3 of one user, 2 of more", help="Of each user, in a run.")
@click.option("--prefill", type=click.IntRange(0), default=2048, help="Tokens of the prompts of a prefill; 0 leaves it out.")
@click.option("--model", default="smollm2-135m-instruct", help="A GGUF file, or a name of the catalog for one.")
@click.option("--endpoint", default="", help="/v1/completions for a model without a chat template.")
@click.option("--braid-arguments", default="", help="More arguments of `braid serve`, as one text.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, help="For servers that are told how many.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here, after each run.")
@peers_folder
def run(users: tuple[int, ...], names: tuple[str, ...], json_path: Path | None, peers_folder: Path, **options: Any) -> None:
    """Measure Braid and all peers that are installed, in turns."""
    resolved = resolve(options["model"])
    if resolved.path.suffix != ".gguf":
        raise click.ClickException(f"{options['model']} is no GGUF file, from which the peers' weights are made")
    loads = loads_for(users, options["requests"], options["prefill"])
    tokens = max(load.input_len + load.output_len for load in loads) + SPARE_TOKENS
    launch = Launch(Path(), resolved.path, options["model"], 0, options["threads"], max(users), tokens)
    servers, missing = find_servers(names, peers_folder, launch, tuple(shlex.split(options["braid_arguments"])))
    servers = [replace(each, endpoint=options["endpoint"]) for each in servers]
    for name, reason in missing.items():
        click.echo(f"{name} {reason}")
    versions = {each.peer.name: each.peer.kit.version(peers_folder / each.peer.kit.name) for each in servers if each.peer.kit.name != BRAID}
    report: dict[str, Any] = {"machine": describe_machine(), "options": {"users": users, **options}, "versions": versions}
    report |= {"missing": missing, "starts": [], "runs": []}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as logs:
        for found in run_rounds(servers, loads, options["rounds"], Path(logs)):
            if isinstance(found, Run):
                runs.append(found)
                report["runs"].append(found.told())
                click.echo(tell(found))
            else:
                report["starts"].append(found)
                click.echo(f"{found['server']}: " + (found.get("failed") or f"ready after {found['ready_s']:.1f} s"))
            if json_path:
                json_path.write_text(json.dumps(report, indent=1, default=str) + "\n")
    click.echo(f"\n{table(runs)}")


@main.command("table")
@click.argument("path", type=click.Path(dir_okay=False, exists=True, path_type=Path))
def table_command(path: Path) -> None:
    """Print the table of a file that `run` wrote."""
    click.echo(table(read_runs(json.loads(path.read_text()))))


if __name__ == "__main__":
    # Whoever stops the comparison stops the server too, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
