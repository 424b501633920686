"""The composition root around stand-ins: `python -m tests.api.root PORT [DRAIN_S [WORKER ARGUMENTS …]]`.

Everything but the codec and the engine's runner is the real thing: sockets, signals, the engine process, its death.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from service import __main__ as root
from service.catalog import Resolved
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
    port, drain_s, *worker = sys.argv[1:]
    root.load_codec = lambda path, name: ByteCodec(name, LetterTokenizer(), eos_ids=(), vocab_size=VOCAB)  # type: ignore[assignment, arg-type]
    command = (sys.executable, "-m", "tests.fake_worker", *worker)
    root.EngineClient = functools.partial(EngineClient, command=command)  # type: ignore[assignment, misc]
    settings = Settings(models=("tiny",), port=int(port), drain_timeout_s=float(drain_s), max_context=512, data_dir="off")
    return root.main(settings, [Resolved("tiny", Path("tiny"), "", 1)])


if __name__ == "__main__":
    sys.exit(main())
