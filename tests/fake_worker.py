"""A real engine process around a scripted runner: `python -m tests.fake_worker [--step-s S] [--num-blocks N] [--start …] --fd N`.

Everything but the loader is `service/worker.py`. Started by the tests of the engine client.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from service import worker
from service.engine.messages import Load
from service.errors import StartupError
from tests.fakes import ScriptedModel, scripted_loader


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--start", choices=["well", "refuse", "crash", "hang"], default="well")
    options, rest = parser.parse_known_args()
    load_well = scripted_loader(step_s=options.step_s, num_blocks=options.num_blocks)

    def load_models(load: Load, progress: Callable[[str, float], None]) -> list[ScriptedModel]:
        if options.start == "refuse":
            raise StartupError("the weights are not what they say")
        if options.start == "crash":
            raise KeyError("nobody expected this")
        if options.start == "hang":
            progress("weights", 0.25)
            time.sleep(600)
        return load_well(load, progress)

    return worker.main(rest, load_models)


if __name__ == "__main__":
    sys.exit(main())
