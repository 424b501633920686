"""The application on Ray Serve: a gate in front of replicas, as Ray's classes; built from a config, or run and watched until a signal.

The one place that knows Ray's ways of starting, calling and cancelling; what happens in a gate or a replica stands in their own modules.
Imported by Ray on the nodes and, late, by `cli`.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.metrics import Gauge
from starlette.requests import Request
from starlette.responses import Response

from service.deploy.child import Child, Figure
from service.deploy.exchange import Forwarded, LostError, Part, Parts
from service.deploy.gate import Gate, Limits
from service.deploy.plan import Plan, plan_of, serve_config
from service.deploy.replica import Replica
from service.errors import OverloadedError, StartupError

# Ray's proxy sets them itself.
_PROXY_FIELDS = (b"date", b"server", b"x-request-id")
REPLICA, GATE = "Replica", "Gate"
_HEALTH_S = 5.0  # between two looks at a replica; three bad ones in a row replace it, a dead process at once


class ServedReplica:
    """A `Replica` as Ray Serve wants it."""

    def __init__(self, arguments: list[str], start_s: float) -> None:
        name = serve.get_replica_context().replica_id.unique_id
        child = Child(arguments, f"--replica={name}", start_s)
        self._is_ending = False
        child.on_end(self._leave)
        keys = re.split(r"[\s,]+", os.environ.get("BRAID_API_KEYS", "").strip(" ,\t\n"))
        self._replica = Replica(name, child, Gauges(), keys[0])

    async def forward(self, request: Forwarded) -> AsyncIterator[Part]:
        async for part in self._replica.forward(request):
            yield part

    async def check_health(self) -> None:
        await self._replica.look()

    def record_routing_stats(self) -> dict[str, float]:
        use = self._replica.use
        return {"kv_use": use.kv, "requests": use.running + use.waiting, "look": self._replica.num_looks}

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self.record_routing_stats()

    def _leave(self) -> None:
        """A replica without its server would draw requests, for it has so little to do: Ray replaces a process that ends at once."""
        if not self._is_ending:
            os._exit(1)

    def __del__(self) -> None:
        self._is_ending = True
        if replica := getattr(self, "_replica", None):
            replica.end()


class Gauges:
    """The server's figures as gauges of Ray, which adds the replica to their labels. What only grows is a gauge, too."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def __call__(self, figures: Iterable[Figure]) -> None:
        for figure in figures:
            gauge = self._gauges.get(figure.name)
            if gauge is None:
                gauge = self._gauges[figure.name] = Gauge(figure.name, figure.text, tuple(figure.labels))
            gauge.set(figure.value, figure.labels)


class HandleLink:
    """The way from the gate to the replicas: a deployment handle, whose router is `router.PrefixRouter`."""

    def __init__(self, handle: Any) -> None:
        # Over gRPC a chunk costs the gate 0.2 ms of a core, through Ray's object store 0.5 (32 streams, two cores of an Intel Xeon).
        self._handle = handle.options(method_name="forward", stream=True, _by_reference=False)

    def send(self, request: Forwarded) -> Parts:
        return HandleParts(self._handle.remote(request))


class HandleParts:
    """One answer as Ray streams it; its errors become ours."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._has_ended = False

    def __aiter__(self) -> HandleParts:
        return self

    async def __anext__(self) -> Part:
        try:
            part: Part = await anext(self._stream)
        except StopAsyncIteration:
            self._has_ended = True
            raise
        except BackPressureError:
            self._has_ended = True
            raise OverloadedError("Too many requests are waiting.", retry_after_s=2.0) from None
        except (RayError, RayServeException, httpx.HTTPError) as error:  # the last: what a replica's own client met
            self._has_ended = True
            raise LostError(type(error).__name__) from error
        return part

    def cancel(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._stream.cancel()


class ServedGate:
    """A `Gate` as Ray Serve wants it."""

    def __init__(self, replicas: Any, wait_s: float, max_body: int) -> None:
        self._gate = Gate(HandleLink(replicas), Limits(wait_s, max_body))

    async def __call__(self, request: Request) -> Response:
        response = await self._gate.answer(request)
        response.raw_headers = [(name, value) for name, value in response.raw_headers if name not in _PROXY_FIELDS]
        return response


def build(arguments: dict[str, Any]) -> Any:
    """The application. arguments: a plan's fields, as in the file that `braid deploy --write` makes."""
    return application(plan_of(arguments))


def application(plan: Plan) -> Any:
    replicas = serve.deployment(
        name=REPLICA,
        max_ongoing_requests=plan.max_requests,
        max_queued_requests=plan.max_queue,
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        autoscaling_config={
            "min_replicas": plan.low,
            "max_replicas": plan.high,
            "target_ongoing_requests": plan.goal_requests,
            "look_back_period_s": 15.0,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": "service.deploy.policy:ScalingPolicy",
                "policy_kwargs": {"requests": plan.goal_requests, "calm_s": plan.calm_s},
            },
        },
        request_router_config={
            "request_router_class": "service.deploy.router:PrefixRouter",
            "request_router_kwargs": {"has_peers": plan.gates > 1},
            "request_routing_stats_period_s": _HEALTH_S,
        },
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=4 * _HEALTH_S,
        graceful_shutdown_timeout_s=60.0,
    )(ServedReplica)
    gate = serve.deployment(
        name=GATE,
        num_replicas=plan.gates,
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
    )(ServedGate)
    return gate.bind(replicas.bind(list(plan.serve), plan.start_s), plan.wait_s, plan.max_body)


def connect(address: str) -> None:
    """address: "auto" for the cluster this machine belongs to, "local" for one of its own. Raises: StartupError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace="braid", log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "; start one with `ray start --head`, or use --address local" if address == "auto" else ""
        raise StartupError(f"no Ray cluster at {address!r}{hint}: {str(error).splitlines()[0][:200]}") from None


def start(plan: Plan) -> None:
    """Starts the proxies and the application, and returns when it is ready. Raises: StartupError."""
    config = serve_config(plan)
    serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
    try:
        serve.run(application(plan), name=plan.name, route_prefix="/", blocking=False)
    except (RayError, RayServeException, RuntimeError) as error:
        serve.shutdown()
        raise StartupError(f"the application did not start: {str(error).splitlines()[0][:300]}") from None


def stop() -> None:
    serve.shutdown()
    ray.shutdown()
