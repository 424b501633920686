"""The composition root around stand-ins: `python -m tests.api.root PORT DRAIN_S [--codec-s S] [WORKER ARGUMENTS …]`.

Everything but the codec and the engine's runner is the real thing: sockets, signals, the engine process, its death.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

from service import __main__ as root
from service.catalog import Resolved
from service.codec import prompt
from service.engine.client import EngineClient
from service.settings import Settings
from tests.api.fakes import ByteCodec, ByteTokenizer
from tests.fakes import VOCAB


class LetterTokenizer(ByteTokenizer):
    """Every id of the scripted runner is a letter."""

    vocab_size = VOCAB

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        return b"%c" % (97 + token % 26)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("drain_s", type=float)
    parser.add_argument("--codec-s", type=float, default=0.0, help="how long loading a codec takes")
    options, worker = parser.parse_known_args()

    def load_codec(path: Path, name: str) -> ByteCodec:
        time.sleep(options.codec_s)
        return ByteCodec(name, LetterTokenizer(), eos_ids=(), vocab_size=VOCAB)  # type: ignore[arg-type]

    prompt.load_codec = load_codec  # type: ignore[assignment]
    command = (sys.executable, "-m", "tests.fake_worker", *worker)
    root.EngineClient = functools.partial(EngineClient, command=command)  # type: ignore[assignment, misc]
    settings = Settings(models=("tiny",), port=options.port, drain_timeout_s=options.drain_s, max_context=512, data_dir="off")
    return root.main(settings, [Resolved("tiny", Path("tiny"), "", 1)])


if __name__ == "__main__":
    sys.exit(main())
