"""A rank that loads and computes nothing: `python -m tests.fake_follower [--how …] --fd N`. Started by the tests of `service/ranks.py`.

It offers 100 minus its rank, and of each step then offers the number of tokens that it was told, so that a test sees what came.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time

from service.errors import StartupError
from service.ranks import Seat, bind_life_to_parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--how", choices=["well", "refuse", "exit", "die", "stuck"], default="well")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()
    bind_life_to_parent()
    seat = Seat(socket.socket(fileno=options.fd))
    if options.how == "refuse":
        seat.give_up("the weights are not what they say")
        return 1
    if seat.least(100 - seat.rank) != 100 - seat.size + 1:
        raise StartupError("that is not the least")
    while (step := seat.next_step()) is not None:
        if seat.rank == seat.size - 1:
            if options.how == "exit":
                return 3
            if options.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if options.how == "stuck":
                time.sleep(600)
        seat.least(sum(len(piece.tokens) for piece in step.slices) + step.model_index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
