"""uvicorn as Braid runs it: with connections of our own (`connection`), and without signal handlers.

No routes here. Called by the composition root and by tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import uvicorn

from service.api.connection import TimedConnection

_FLUSH_S = 3  # for answers that are being written when the server ends


class Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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
