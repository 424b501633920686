"""Root of the HTTP process: sockets, engine client, codecs, app, server, and the way they end. Reads top to bottom as a straight line.

The only place that takes `Settings` apart; everything else gets the numbers that it needs. Called by `braid serve`.
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
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import uvicorn

from service.api.app import Limits, build_app
from service.api.auth import hosts_to_accept
from service.api.backend import vocabulary_of
from service.api.body import BodyLimits
from service.api.connection import TimedConnection
from service.api.insider import SelfCaller
from service.api.media import MediaLimits
from service.api.routes import VERSION
from service.catalog import Resolved
from service.codec.pixels import PictureLimits
from service.codec.prompt import Codec, load_codec
from service.engine.client import EngineClient
from service.engine.messages import Load, ModelSource
from service.errors import StartupError
from service.jobs.desk import Desk, open_desk
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger("braid")

_FLUSH_S = 3  # for answers that are being written when the server ends
_DEAD_S = 1.0  # in which probes can still see that the engine is dead


class Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(settings: Settings, models: Sequence[Resolved]) -> int:
    """Serves until a signal or the engine's death. Returns the exit status. Raises: StartupError when it can't begin."""
    level = settings.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.getLogger("httpx").setLevel("WARNING")
    return asyncio.run(serve(settings, models))


async def serve(settings: Settings, models: Sequence[Resolved]) -> int:
    """The server's whole life. Returns 0 after a drain, 1 when the engine died. Raises: StartupError."""
    start = time.monotonic()
    sock = listen(settings.host, settings.port)
    engine = EngineClient(
        _load_message(settings, models),
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
        codecs = await asyncio.to_thread(_load_codecs, models)
        metrics = Metrics(settings.metrics_prefix, codecs)
        metrics.watch_engine(
            stats=engine.stats,
            models=engine.models,
            is_ready=lambda: engine.health().state == "ready",
            has_prefix_cache=settings.prefix_cache,
        )
        engine.on_delivery.append(metrics.on_delivery)
        desk = _open_desk(settings)
        if desk is not None:
            ends.push_async_callback(desk.close)
        app = build_app(
            engine=engine,
            codecs=codecs,
            metrics=metrics,
            limits=_limits(settings),
            api_keys=settings.api_keys,
            allow_origins=settings.allow_origins,
            hosts=hosts_to_accept(settings.host, bool(settings.api_keys), settings.allowed_hosts),
            desk=desk,
        )
        server = make_server(app)
        serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
        ends.push_async_callback(_stop, server, serving)
        await _first(loading, leaving.wait(), serving)
        if loading.done():
            loading.result()
            if desk is not None:
                desk.batches.start(SelfCaller(app))
            _announce(sock, codecs, time.monotonic() - start)
            _teach(engine, codecs)
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


def _load_message(settings: Settings, models: Sequence[Resolved]) -> Load:
    return Load(
        models=tuple(ModelSource(model.name, str(model.path)) for model in models),
        dtype=settings.dtype,
        device=settings.device,
        memory_bytes=settings.memory,
        max_context=settings.max_context,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        prefix_cache=settings.prefix_cache,
        threads=settings.threads,
        log_level=settings.log_level,
        max_prefill_s=settings.max_prefill_ms / 1e3,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        BodyLimits(max_bytes=settings.max_body_bytes, is_strict=settings.strict, origins=settings.allow_origins),
        settings.max_queue_requests,
        media=MediaLimits(PictureLimits(settings.max_image_bytes, settings.max_image_pixels), hosts=settings.media_hosts),
    )


def _load_codecs(models: Sequence[Resolved]) -> dict[str, Codec]:
    return {model.name: load_codec(model.path, name=model.name) for model in models}


def _open_desk(settings: Settings) -> Desk | None:
    if settings.data_folder is None:
        return None
    return open_desk(
        settings.data_folder,
        max_file_bytes=settings.max_file_bytes,
        max_total_bytes=settings.max_data_bytes,
        max_line_bytes=settings.max_body_bytes,
        concurrency=settings.batch_requests,
    )


def make_server(app: object) -> Server:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=TimedConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=32 * 1024,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=_FLUSH_S,
    )
    return Server(config)


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


def _announce(sock: socket.socket, codecs: dict[str, Codec], seconds: float) -> None:
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("braid %s serves %s at http://%s:%d/v1, ready after %.1f s", VERSION, ", ".join(codecs), shown, port, seconds)
    # What start-up made stays for good: the collector need not walk it while tokens flow.
    gc.collect()
    gc.freeze()


def _teach(engine: EngineClient, codecs: dict[str, Codec]) -> None:
    """The engine makes its tables for grammars now: a quarter of a second for 49,000 tokens, in which nothing else of it runs."""
    for name, codec in codecs.items():
        if engine.models()[name].can_generate:
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
