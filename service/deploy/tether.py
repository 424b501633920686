"""Runs `braid serve` for as long as the process that started it lives: `python -m service.deploy.tether -- ARGUMENTS`.

Its standard input is a pipe that nobody writes to. When it ends, the other side is gone, however it went, and a server without it would
keep its memory and its device for nothing. Started by `child`; what stands before -- is for people who list processes.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_PATIENCE_S = 2.0  # between the first signal, which drains, and the second, which ends the server on the spot


def _watch() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_S)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> None:
    threading.Thread(target=_watch, name="tether", daemon=True).start()
    sys.argv = ["braid", "serve", *arguments]
    runpy.run_module("service.cli", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--") + 1 :])
