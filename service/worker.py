"""Root of the engine process: `python -m service.worker --fd N`, where N is its end of a socket pair.

Reads top to bottom: mailbox, ranks, load, lanes, engine, run. Its settings are the first message. Nothing but the engine client starts it,
and it never outlives the process that did.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from service.engine.drafting import Drafting, make_tables
from service.engine.engine import Ahead, BrokenEngineError, Engine, Lane, Painter, Runner
from service.engine.mailbox import Mailbox
from service.engine.messages import Failed, Load, ModelInfo, Progress, Ready
from service.engine.pace import BeatThread
from service.engine.prompt_pace import PromptPace
from service.errors import StartupError
from service.memory import give_memory_back
from service.ranks import Ranks, bind_life_to_parent
from service.scheduling.plan import KVGroup, RunnerCounts
from service.scheduling.scheduler import Scheduler

log = logging.getLogger("braid.worker")

_FLUSH_S = 5.0
# The client counts what is in flight and refuses there; a second limit here could only refuse what was admitted.
_NO_LIMIT = 2**62


class Loaded(Protocol):
    """A model that is ready to run."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def runner(self) -> Runner: ...

    @property
    def groups(self) -> tuple[KVGroup, ...]: ...

    @property
    def painter(self) -> Painter | None: ...

    @property
    def counts(self) -> Callable[[], RunnerCounts]: ...

    @property
    def draft(self) -> Loaded | None:
        """What guesses ids for it."""

    @property
    def ahead(self) -> Ahead | None:
        """The runner, where steps are begun one ahead."""


LoadModels = Callable[[Load, Callable[[str, float], None]], Sequence[Loaded]]


def main(arguments: Sequence[str] | None = None, load_models: LoadModels | None = None) -> int:
    """The exit status: 0 after `Shutdown`, 1 when start-up failed or the engine broke."""
    parser = argparse.ArgumentParser(prog="service.worker", description="Braid's engine process; started by the server, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="this process's end of a socket pair")
    fd = parser.parse_args(arguments).fd

    bind_life_to_parent()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # The reading thread calls this even while a step is stuck, so the process ends with its parent in every state.
    mailbox = Mailbox(socket.socket(fileno=fd), on_lost=lambda: os._exit(1))
    messages = mailbox.receive(None)
    if not messages or not isinstance(messages[0], Load):
        log.error("the first message was not Load")
        return 1
    load = messages[0]
    logging.getLogger().setLevel(load.log_level.upper())

    ranks: Ranks | None = None
    gc.disable()  # what is imported and loaded stays; walking it again and again cost 0.15 s of torch's 1.3
    try:
        if load.tensor_parallel > 1:
            ranks = Ranks(load, on_lost=partial(end_at_once, mailbox))
        loaded = (load_models or partial(load_checkpoints, ranks=ranks))(
            load, lambda phase, fraction: mailbox.send(Progress(phase, fraction))
        )
        lanes = [build_lane(one, load) for one in loaded]
    except StartupError as error:
        return give_up(mailbox, error.message)
    except Exception as error:
        log.exception("the engine could not start")
        return give_up(mailbox, f"the engine could not start ({type(error).__name__}); its log has the details")

    # What was loaded stays for good: the collector need not walk it in the middle of a step.
    gc.freeze()
    gc.enable()
    engine = Engine(lanes, mailbox, time.monotonic)
    mailbox.send(Ready(models=tuple(one.info for one in loaded)))
    give_memory_back()
    BeatThread(mailbox, engine.pulse).start()
    try:
        engine.run()
    except BrokenEngineError as error:
        return give_up(mailbox, error.message)
    finally:
        if ranks is not None:
            ranks.close()
    return 0


def load_checkpoints(load: Load, progress: Callable[[str, float], None], ranks: Ranks | None = None) -> Sequence[Loaded]:
    """The real thing, of which ranks hold a share each. Imported here, late: it brings torch, which takes seconds and may be broken, and
    both are worth a message."""
    progress("starting", 0.0)
    from service.runner.load import load_models

    return load_models(load, progress, ranks)


def build_lane(loaded: Loaded, load: Load) -> Lane:
    info = loaded.info
    scheduler = Scheduler(
        num_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        groups=loaded.groups,
        max_batch_tokens=load.max_batch_tokens,
        max_sequences=load.max_sequences,
        max_context=info.max_context,
        # An encoder's tokens see those behind them, so it computes a text whole and no two share a beginning.
        has_prefix_cache=load.prefix_cache and info.can_generate,
        whole_prompts=not info.can_generate,
        pictures=info.pictures,
        has_draft_model=loaded.draft is not None,
        max_waiting_requests=_NO_LIMIT,
        max_waiting_tokens=_NO_LIMIT,
    )
    drafting = None if loaded.draft is None else build_drafting(loaded.draft, load)
    pace = PromptPace(load.max_prefill_s)
    return Lane(info, scheduler, loaded.runner, loaded.painter, pace=pace, drafting=drafting, ahead=loaded.ahead, counts=loaded.counts)


def build_drafting(draft: Loaded, load: Load) -> Drafting:
    info = draft.info
    return Drafting(
        draft.runner,
        make_tables(info.num_kv_blocks, info.block_size, draft.groups, has_prefix_cache=load.prefix_cache),
        max_context=info.max_context,
        max_batch_tokens=load.max_batch_tokens,
        clock=time.monotonic,
    )


def give_up(mailbox: Mailbox, message: str) -> int:
    """Says why on stderr and up the mailbox. Returns the exit status."""
    log.error("%s", message)
    mailbox.send(Failed(message))
    mailbox.flush(_FLUSH_S)
    return 1


def end_at_once(mailbox: Mailbox, message: str) -> None:
    """For a rank's end: the loop may be stuck in a sum that will never come, so nothing waits for it."""
    give_up(mailbox, message)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
