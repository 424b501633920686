"""Root of the HTTP process: socket, engine client, door, server, app, and the way they end. Reads top to bottom as a straight line.

The only place that takes `Settings` apart; everything else gets the numbers that it needs. Called by `braid serve`.
What is imported here is little, and the rest comes in two pieces when it is wanted: the engine's process starts first, then the port
answers, and the app is imported and built beside an engine that imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from service.catalog import Resolved, cache_folder
from service.engine.client import EngineClient
from service.engine.messages import Load, ModelSource
from service.errors import StartupError, UnavailableError
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    from service.api.door import Door
    from service.api.insider import SelfCaller
    from service.api.server import Server
    from service.codec.prompt import Codec
    from service.jobs.desk import Desk
    from service.metrics import Metrics

log = logging.getLogger("braid")

_DEAD_S = 1.0  # in which probes can still see that the engine is dead
_CALM_S = 1.0  # after which the engine, asked for nothing, makes its tables for grammars


def main(settings: Settings, models: Sequence[Resolved], draft: Resolved | None = None) -> int:
    """Serves until a signal or the engine's death. draft: guesses for the first of the models. Returns the exit status.

    Raises: StartupError when it can't begin."""
    level = settings.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.getLogger("httpx").setLevel("WARNING")
    return asyncio.run(serve(settings, models, draft))


async def serve(settings: Settings, models: Sequence[Resolved], draft: Resolved | None = None) -> int:
    """The server's whole life. Returns 0 after a drain, 1 when the engine died. Raises: StartupError."""
    start = time.monotonic()
    sock = listen(settings.host, settings.port)
    engine = EngineClient(
        _load_message(settings, models, draft),
        max_requests_in_flight=settings.max_queue_requests,
        max_tokens_in_flight=settings.max_queue_tokens,
        stall_exit_s=settings.stall_exit_s,
    )
    leaving = asyncio.Event()
    install_signal_handlers(leaving)
    loading = asyncio.create_task(engine.start(), name="engine-start")
    async with contextlib.AsyncExitStack() as ends:
        ends.callback(sock.close)
        ends.push_async_callback(_settled, loading)
        ends.push_async_callback(engine.close)
        await asyncio.sleep(0)  # the engine's process starts now, before anything else is imported here
        gc.disable()
        metrics = _metrics(settings, models, engine)
        desk = _open_desk(settings)
        if desk is not None:
            ends.push_async_callback(desk.close)
        layers = _layers(settings, metrics)
        door, server = _open_door(engine, layers)
        serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
        ends.push_async_callback(_stop, server, serving)
        ends.callback(door.shut)
        codecs, app = await asyncio.to_thread(_build_app, settings, models, engine, metrics, layers, desk)
        if draft is not None:
            await asyncio.to_thread(_check_tokens, models[0].name, codecs[models[0].name], draft)
        door.open(app)
        # What start-up made stays for good: the collector need not walk it, neither while it grows nor while tokens flow.
        gc.freeze()
        gc.enable()
        await _first(loading, leaving.wait(), serving)
        if loading.done():
            loading.result()
            _announce(sock, models, time.monotonic() - start)
            if desk is not None:
                desk.batches.start(_self_caller(app))
            teaching = asyncio.create_task(_teach(engine, codecs), name="teaching")
            ends.callback(teaching.cancel)
            await _first(leaving.wait(), engine.dead.wait(), serving)
        if desk is not None:
            await desk.batches.stop()
        if leaving.is_set():
            await _drain(engine, settings.drain_timeout_s)
        if engine.dead.is_set():
            log.error("ending because the engine is dead: %s", engine.health().detail)
            await asyncio.sleep(_DEAD_S)
        return 0 if leaving.is_set() and not engine.dead.is_set() else 1


def listen(host: str, port: int) -> socket.socket:
    """Raises: StartupError when the address is taken or is none."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=2048)
    except OSError as error:
        is_name_unknown = isinstance(error, socket.gaierror)
        reason = error.strerror if is_name_unknown else os.strerror(error.errno or 0)
        raise StartupError(f"can't listen on {host}:{port}: {reason}; another --host or --port may do") from error


def _load_message(settings: Settings, models: Sequence[Resolved], draft: Resolved | None) -> Load:
    return Load(
        models=tuple(ModelSource(model.name, str(model.path)) for model in models),
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        device=settings.device,
        memory_bytes=settings.memory,
        max_context=settings.max_context,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        prefix_cache=settings.prefix_cache,
        deterministic=settings.deterministic,
        threads=settings.threads,
        log_level=settings.log_level,
        draft=ModelSource(draft.name, str(draft.path)) if draft is not None else None,
        max_prefill_s=settings.max_prefill_ms / 1e3,
        prepared_folder=str(cache_folder() / "prepared"),
        kernel_folder=str(cache_folder() / "triton"),
        max_prepared_bytes=settings.max_prepared_bytes,
        tensor_parallel=settings.tensor_parallel,
        async_scheduling=settings.async_scheduling,
    )


# Each of these imports what it needs: at the head of the file it would hold up the engine, or the port.


def _metrics(settings: Settings, models: Sequence[Resolved], engine: EngineClient) -> Metrics:
    from service.metrics import Metrics

    metrics = Metrics(settings.metrics_prefix, [model.name for model in models])
    metrics.watch_engine(
        stats=engine.stats,
        models=engine.models,
        is_ready=lambda: engine.health().state == "ready",
        has_prefix_cache=settings.prefix_cache,
    )
    engine.on_delivery.append(metrics.on_delivery)
    return metrics


def _open_desk(settings: Settings) -> Desk | None:
    from service.jobs.desk import open_desk

    if settings.data_folder is None:
        return None
    return open_desk(
        settings.data_folder,
        max_file_bytes=settings.max_file_bytes,
        max_total_bytes=settings.max_data_bytes,
        max_line_bytes=settings.max_body_bytes,
        concurrency=settings.batch_requests,
    )


def _layers(settings: Settings, metrics: Metrics) -> list[Middleware]:
    from service.api.auth import hosts_to_accept
    from service.api.layers import make_layers

    hosts = hosts_to_accept(settings.host, bool(settings.api_keys), settings.allowed_hosts)
    return make_layers(metrics, api_keys=settings.api_keys, allow_origins=settings.allow_origins, hosts=hosts)


def _open_door(engine: EngineClient, layers: Sequence[Middleware]) -> tuple[Door, Server]:
    from service.api.door import Door, Probes
    from service.api.server import make_server

    door = Door(Probes(engine), layers)
    return door, make_server(door)


def _check_tokens(name: str, codec: Codec, draft: Resolved) -> None:
    """Raises: StartupError where an id means something else to the draft model than to the model of this name."""
    from service.codec.prompt import load_codec

    own, other = codec.tokenizer.pieces, load_codec(draft.path, name=draft.name).tokenizer.pieces
    if own != other:
        at = next((token for token, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), min(len(own), len(other)))
        raise StartupError(
            f"--draft-model: {draft.name} and {name} do not have the same tokens (id {at} is the first that differs); "
            "a draft model must share its model's tokenizer"
        )


def _build_app(
    settings: Settings,
    models: Sequence[Resolved],
    engine: EngineClient,
    metrics: Metrics,
    layers: Sequence[Middleware],
    desk: Desk | None,
) -> tuple[dict[str, Codec], FastAPI]:
    """Runs in a thread while the engine loads. Raises: StartupError, WeightsError."""
    from service.api.app import Limits, build_app
    from service.api.body import BodyLimits
    from service.api.media import MediaLimits
    from service.codec.pixels import PictureLimits
    from service.codec.prompt import load_codec

    codecs = {model.name: load_codec(model.path, name=model.name) for model in models}
    limits = Limits(
        BodyLimits(max_bytes=settings.max_body_bytes, is_strict=settings.strict, origins=settings.allow_origins),
        settings.max_queue_requests,
        media=MediaLimits(PictureLimits(settings.max_image_bytes, settings.max_image_pixels), hosts=settings.media_hosts),
    )
    return codecs, build_app(engine=engine, codecs=codecs, metrics=metrics, limits=limits, layers=layers, desk=desk)


def _self_caller(app: FastAPI) -> SelfCaller:
    from service.api.insider import SelfCaller

    return SelfCaller(app)


def install_signal_handlers(leaving: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT sets `leaving`; the second ends the process on the spot, and the engine dies with it."""

    def on_signal(number: int) -> None:
        if leaving.is_set():
            log.warning("asked twice: ending now")
            os._exit(128 + number)
        leaving.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


async def _first(*waits: asyncio.Task[Any] | Coroutine[Any, Any, Any]) -> None:
    """Until one of them is done. Coroutines among them are cancelled then, tasks live on."""
    own = [asyncio.create_task(wait) for wait in waits if not isinstance(wait, asyncio.Task)]
    try:
        await asyncio.wait([*own, *(wait for wait in waits if isinstance(wait, asyncio.Task))], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in own:
            task.cancel()


def _announce(sock: socket.socket, models: Sequence[Resolved], seconds: float) -> None:
    from service.api.routes import VERSION

    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(model.name for model in models)
    log.info("braid %s serves %s at http://%s:%d/v1, ready after %.1f s", VERSION, names, shown, port, seconds)


async def _teach(engine: EngineClient, codecs: dict[str, Codec]) -> None:
    """The engine makes its tables for grammars as soon as nobody is served: a quarter of a second for 49,000 tokens, in which nothing else
    of it runs. Whoever needs one before teaches it at once."""
    from service.api.backend import vocabulary_of

    for name, codec in codecs.items():
        await asyncio.sleep(_CALM_S)
        while engine.num_in_flight:
            await asyncio.sleep(_CALM_S)
        if engine.models()[name].can_generate:
            with contextlib.suppress(UnavailableError):
                engine.teach(name, functools.partial(vocabulary_of, name, codec))


async def _drain(engine: EngineClient, timeout_s: float) -> None:
    """Until running requests have ended, or the engine has."""
    log.info("draining for at most %g s", timeout_s)
    await _first(engine.drain(timeout_s), engine.dead.wait())


async def _stop(server: Server, serving: asyncio.Task[None]) -> None:
    """Answers that are being written go out first."""
    server.should_exit = True
    await _settled(serving)


async def _settled(task: asyncio.Task[None]) -> None:
    """Its failure, if any, has been told already."""
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, StartupError):
        log.error("%s failed", task.get_name(), exc_info=error)


if __name__ == "__main__":
    sys.exit("start the server with: braid serve")
