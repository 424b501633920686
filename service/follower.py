"""Root of every rank but the first of an engine that tensor parallelism splits: `python -m service.follower --fd N`.

It loads its share and computes what rank 0 tells it, step by step. No scheduler, no requests, no sampling: those are rank 0's, which
starts it (`ranks.py`) and which it never outlives.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from service.errors import StartupError
from service.memory import give_memory_back
from service.ranks import Seat, bind_life_to_parent

if TYPE_CHECKING:
    from service.runner.runner import Runner

log = logging.getLogger("braid.rank")

_LAST_WORDS_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when rank 0 is done, 1 when this rank could not start or go on."""
    parser = argparse.ArgumentParser(prog="service.follower", description="A rank of Braid's engine; started by the engine, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="this process's end of a socket pair")
    bind_life_to_parent()
    seat = Seat(socket.socket(fileno=parser.parse_args(arguments).fd))
    form = f"%(asctime)s %(levelname)s %(name)s {seat.rank}: %(message)s"
    logging.basicConfig(level=seat.load.log_level.upper(), format=form, stream=sys.stderr)

    gc.disable()
    try:
        from service.runner.load import load_models
        from service.runner.parallel import follow

        runners = [cast("Runner", one.runner) for one in load_models(seat.load, lambda phase, fraction: None, seat)]
        gc.freeze()
        gc.enable()
        give_memory_back()
        while (step := seat.next_step()) is not None:
            follow(runners[step.model_index], step.slices, step.num_rows)
    except StartupError as error:
        seat.give_up(error.message)  # rank 0 says it, on its own account or on ours
        return 1
    except Exception as error:
        time.sleep(_LAST_WORDS_S)  # where rank 0 is gone, that was the cause, and this process ends here
        log.exception("this rank can't go on")
        seat.give_up(f"rank {seat.rank} of {seat.size} failed ({type(error).__name__}); its log has the details")
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # threads of a broken group of processes would hold up an orderly end
