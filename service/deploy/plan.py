"""What a deployment is told, checked once, and the file that says it to Ray Serve.

No ray: a file can be written where it is not installed. Called by `cli` and, on the cluster, by `cluster`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import StartupError

# What a replica is told by the deployment itself.
_OWN_FLAGS = ("--host", "--port")
_SHARED_FLAG = "--data-dir"


@dataclass(frozen=True, slots=True)
class Plan:
    """serve: arguments of `braid serve` for each replica. low and high: replicas. cpus and gpus: of each. goal_requests: in flight in each
    replica, what the number of replicas aims at; max_requests: what a replica takes at most, the rest waits at the gate, of which there are
    `gates`, with at most max_queue waiting at each. calm_s: so long fewer replicas must do before one is ended. start_s: for a replica to
    be ready. wait_s: for a request to be taken."""

    serve: tuple[str, ...]
    name: str = "braid"
    host: str = "127.0.0.1"
    port: int = 8000
    low: int = 1
    high: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    goal_requests: float = 16.0
    max_requests: int = 96
    max_queue: int = 1024
    gates: int = 1
    calm_s: float = 300.0
    start_s: float = 600.0
    wait_s: float = 30.0
    max_body: int = 32 * 2**20


def read_replicas(text: str) -> tuple[int, int]:
    """ "4" or "1:8". Raises: StartupError."""
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise StartupError(f"--replicas {text!r} is not a number of at least 1, or two of them such as 1:8, the smaller first")
    return low, high


def serve_arguments(models: Sequence[str], flags: Sequence[str], plan: Plan) -> tuple[str, ...]:
    """The arguments of a replica's server. flags: what the person gave. Raises: StartupError for flags that can't be theirs."""
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    for flag in _OWN_FLAGS:
        if flag in names:
            raise StartupError(f"{flag} stands after --; the replicas choose their own, {flag} before -- is the deployment's")
    told = list(flags)
    if plan.high > 1:
        if _SHARED_FLAG in names:
            raise StartupError(f"{_SHARED_FLAG} works with one replica only: files and batches live where they were sent to")
        told += [_SHARED_FLAG, "off"]
    if "--threads" not in names and not plan.gpus and plan.cpus >= 1:
        told += ["--threads", str(int(plan.cpus))]
    if "--allowed-host" not in names and plan.host not in ("127.0.0.1", "localhost", "::1"):
        told += ["--allowed-host", "*"]
    return (*models, *told)


def serve_config(plan: Plan) -> dict[str, Any]:
    """What `serve deploy` reads. The application gets the plan as arguments."""
    arguments = {each.name: getattr(plan, each.name) for each in dataclasses.fields(plan)}
    arguments["serve"] = list(plan.serve)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": plan.host, "port": plan.port},
        "applications": [
            {"name": plan.name, "route_prefix": "/", "import_path": "service.deploy.cluster:build", "args": arguments},
        ],
    }


def plan_of(arguments: dict[str, Any]) -> Plan:
    """The plan that stands in a config. Raises: StartupError for a name that is none of its fields."""
    known = {each.name for each in dataclasses.fields(Plan)}
    if unknown := sorted(set(arguments) - known):
        raise StartupError(f"the application has no argument {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return Plan(**{**arguments, "serve": tuple(arguments["serve"])})
