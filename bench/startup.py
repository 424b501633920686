"""How long `braid serve` takes to answer, to be ready and to write its first token, and the memory that it holds then.

    python -m bench.startup --json start.json            five first and five later starts, and as many imports of torch, in turn
    python -m bench.startup --cold                       drops the files' pages before each start, where nobody else has them mapped

A first start finds no prepared weights and writes them, a later one maps them; both use a cache folder of their own. Seconds
count from the start of the process. Memory is the proportional set size (what is shared counts in parts) of each process, without the K/V
pool, which is the engine's largest mapping: it is reserved whole and becomes resident as it is used. One start goes before those that
count, so that bytecode is written, as an installation has it. CPU seconds are told too: on a busy machine they are what can be
compared, and so is the first token as a multiple of torch's import in the same run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from service.catalog import cache_folder, resolve

MODEL = "smollm2-135m-instruct"
USERS = 16
_POLL_S = 0.005
_PATIENCE_S = 300.0
_TORCH = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
_WORDS = "time year people way day man thing woman life child world school state family student group country problem hand part".split()


@dataclass
class Start:
    """Seconds since the process was started. phases: when /ready first named each. memory: bytes of every process, see `memory_of`."""

    health_s: float = 0.0
    ready_s: float = 0.0
    first_token_s: float = 0.0
    cpu_s: float = 0.0  # of all processes, up to the first token
    phases: dict[str, float] = field(default_factory=dict)
    memory: dict[str, list[dict[str, int]]] = field(default_factory=dict)


def environment() -> dict[str, str]:
    """This one, with bytecode: without it our own modules are compiled at every start."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@contextlib.contextmanager
def serving(model: str, arguments: Iterable[str]) -> Iterator[tuple[subprocess.Popen[bytes], int, float]]:
    """The process, its port, and when it was started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", model, "--port", str(port), "--log-level", "warning", *arguments]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
    try:
        yield server, port, start
    finally:
        server.terminate()
        server.wait(60)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status 0 while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def chat(port: int, text: str, max_tokens: int) -> float:
    """A streamed request, read to its end. Returns when its first text came, or the end where there is none, in perf_counter's seconds."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise click.ClickException(f"the server answered {answer.status}: {answer.read()[:300]!r}")
        first = 0.0
        for line in answer:
            if not first and b'"content":"' in line.replace(b'"content":""', b""):
                first = time.perf_counter()
        return first or time.perf_counter()
    finally:
        connection.close()


def processes_of(server: subprocess.Popen[bytes]) -> list[int]:
    """The server and what it started."""
    found = [server.pid]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def memory_of(pid: int) -> dict[str, int]:
    """pss: bytes without the K/V pool. anonymous, file: its parts. kv_pool, kv_reserved: the pool's resident and reserved bytes, 0 in a
    process without one."""
    totals = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, value = line.partition(":")
        totals[key] = int(value.split()[0]) * 1024
    reserved, resident = largest_mapping(Path(f"/proc/{pid}/smaps").read_text())
    if reserved < 2**28:
        reserved = resident = 0
    return {
        "pss": totals["Pss"] - resident,
        "anonymous": totals["Pss_Anon"] - resident,
        "file": totals["Pss_File"],
        "kv_pool": resident,
        "kv_reserved": reserved,
    }


def largest_mapping(smaps: str) -> tuple[int, int]:
    """Reserved and proportionally resident bytes of the largest mapping of no file that can be written."""
    largest, is_anonymous, size = (0, 0), False, 0
    for line in smaps.splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            is_anonymous = fields[1].startswith("rw") and len(fields) == 5
        elif is_anonymous and fields[0] == "Size:":
            size = int(fields[1]) * 1024
        elif is_anonymous and fields[0] == "Pss:" and size > largest[0]:
            largest = (size, int(fields[1]) * 1024)
    return largest


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(model: str, arguments: Iterable[str], has_load: bool = True) -> Start:
    """One start, from nothing to the answers of a load of 16 requests."""
    found = Start()
    with serving(model, arguments) as (server, port, start):
        while not found.ready_s:
            status, body = get(port, "/ready" if found.health_s else "/health")
            now = time.perf_counter() - start
            if status:
                found.health_s = found.health_s or now
                found.phases.setdefault(json.loads(body)["detail"] or "ready", now)
            if status == 200:
                found.ready_s = now
            elif server.poll() is not None or now > _PATIENCE_S:
                raise click.ClickException(f"the server did not start (status {server.returncode})")
            else:
                time.sleep(_POLL_S)
        found.first_token_s = chat(port, "Say hello.", 4) - start
        pids = processes_of(server)
        found.cpu_s = sum(map(cpu_seconds, pids))
        found.memory["first_answer"] = [memory_of(pid) for pid in pids]
        if has_load:
            with ThreadPoolExecutor(USERS) as users:
                list(users.map(lambda number: chat(port, prompt(number), 128), range(USERS)))
            found.memory["load"] = [memory_of(pid) for pid in pids]
    return found


def prompt(number: int) -> str:
    """About 140 tokens that no other prompt begins with."""
    return " ".join(random.Random(number).choices(_WORDS, k=110))


def torch_seconds() -> float:
    """`import torch` in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=True, env=environment())
    return float(done.stdout)


def drop_pages(folders: Iterable[Path]) -> None:
    """Tells the system that nobody needs the files' pages; those that a process has mapped stay."""
    for folder in folders:
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file():
                    handle = os.open(path, os.O_RDONLY)
                    try:
                        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    finally:
                        os.close(handle)


def total(start: Start, when: str, key: str) -> float:
    """Megabytes of all processes."""
    return sum(each[key] for each in start.memory[when]) / 1e6


def summarise(starts: list[Start], torch_s: list[float]) -> dict[str, float]:
    """Medians. over_torch_s, times_torch: from the start to the first token, less, and over, what importing torch takes alone."""
    found = {name: statistics.median(getattr(each, name) for each in starts) for name in ("health_s", "ready_s", "first_token_s", "cpu_s")}
    found["torch_s"] = statistics.median(torch_s)
    found["over_torch_s"] = found["first_token_s"] - found["torch_s"]
    found["times_torch"] = found["first_token_s"] / found["torch_s"]
    for when in starts[0].memory:
        found[f"{when}_pss_mb"] = statistics.median(total(each, when, "pss") for each in starts)
        found[f"{when}_kv_pool_mb"] = statistics.median(total(each, when, "kv_pool") for each in starts)
    return found


def report(kind: str, found: dict[str, float]) -> None:
    click.echo(
        f"{kind} start: first answer {found['health_s']:.2f} s, ready {found['ready_s']:.2f} s, first token {found['first_token_s']:.2f} s"
    )
    click.echo(
        f"torch alone {found['torch_s']:.2f} s; first token {found['over_torch_s']:.2f} s more, {found['times_torch']:.2f} times that; "
        f"CPU {found['cpu_s']:.2f} s"
    )
    for when, words in (("first_answer", "after the first answer"), ("load", f"after {USERS} requests")):
        if f"{when}_pss_mb" in found:
            click.echo(f"memory {words}: {found[f'{when}_pss_mb']:.0f} MB, and {found[f'{when}_kv_pool_mb']:.0f} MB of K/V")


@contextlib.contextmanager
def own_cache() -> Iterator[Path]:
    """A cache folder with the user's models and nothing else, which `BRAID_CACHE` names meanwhile."""
    users = cache_folder()
    with tempfile.TemporaryDirectory(prefix=".startup-", dir=users if users.is_dir() else None) as folder:
        (Path(folder) / "models").symlink_to(users / "models")
        before = os.environ.get("BRAID_CACHE")
        os.environ["BRAID_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("BRAID_CACHE")
            if before is not None:
                os.environ["BRAID_CACHE"] = before


def forget_prepared(cache: Path) -> None:
    """So that the next start is a first one."""
    shutil.rmtree(cache / "prepared", ignore_errors=True)


@click.command(context_settings={"show_default": True})
@click.argument("model", default=MODEL)
@click.option("--starts", "num_starts", type=click.IntRange(1), default=5, help="Those that count.")
@click.option("--cold", "is_cold", is_flag=True, help="Drop the pages of the weights and of all packages before each start.")
@click.option("--server-argument", "arguments", multiple=True, help="Passed on to `braid serve`; repeatable.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(model: str, num_starts: int, is_cold: bool, arguments: tuple[str, ...], json_path: Path | None) -> None:
    """Measure start-up."""
    files = [resolve(model).path, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))]
    load_before = os.getloadavg()[0]
    arguments = ("--data-dir", "off", *arguments)
    starts: dict[str, list[Start]] = {"first": [], "later": []}
    torch_s = []
    with own_cache() as cache:
        measure(model, arguments, has_load=False)
        torch_seconds()
        for _ in range(num_starts):
            forget_prepared(cache)
            for kind in ("torch", "first", "later"):
                if is_cold:
                    drop_pages([*files, cache])
                if kind == "torch":
                    torch_s.append(torch_seconds())
                else:
                    starts[kind].append(measure(model, arguments))
    found = {kind: summarise(each, torch_s) for kind, each in starts.items()}
    for kind, medians in found.items():
        report(kind, medians)
    if json_path is not None:
        # Late: it brings torch, whose files this process would else hold and share.
        from bench.probe import describe_machine

        figures: dict[str, Any] = {
            "machine": {**describe_machine(), "load_before": load_before},
            "options": {"model": model, "starts": num_starts, "cold": is_cold, "arguments": arguments},
            "medians": found,
            "torch_s": torch_s,
            "starts": {kind: [asdict(one) for one in each] for kind, each in starts.items()},
        }
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
