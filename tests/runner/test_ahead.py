"""The engine over a real runner: steps that are begun one ahead, replayed, between aborts and faults, draw what steps one by one draw."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from service.engine.engine import Engine, Lane
from service.engine.messages import Abort, Generate, ModelInfo
from service.runner import drawing, graphs, state
from service.runner.kv_cache import partition_layers
from service.runner.sampler import Sampler
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams
from service.scheduling.scheduler import Scheduler
from tests.engine.test_loop import ListMailbox
from tests.runner.served import BLOCK_SIZE, CONFIGS, build_runner
from tests.runner.test_graphs import RerunRecorder

MOST = 6
Answers = dict[tuple[str, int], tuple[list[int], str | None]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def some_request(name: str, chance: random.Random) -> Generate:
    prompt = [chance.choice((5, 6, 7, 8, 9, 20, 30)) for _ in range(chance.choice((1, 3, 8, 19, 40)))]
    if chance.random() < 0.4:
        prompt = [5, 6, 7, 8] * 2  # asked again, so a prefix is found
    wishes: dict[str, Any] = {"seed": chance.randrange(1000)}
    for wish in (
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": ((5, 2.0), (7, 3.0))},
        {"stop_ids": tuple(chance.sample(range(100), 40)), "min_tokens": chance.choice((0, 3))},
        {"temperature": 0.0},
        {"top_k": 10, "top_p": 0.9},
        {"logprobs": 2},
    ):
        if chance.random() < 0.3:
            wishes |= wish
    params = SamplingParams(max_tokens=chance.randint(1, 20), **wishes)
    kind = chance.choice(("plain", "plain", "guided", "two", "guessed", "read", "pooled"))
    own = {
        "guided": {"unconditional": prompt[-2:], "guidance": 2.0},
        "two": {"num_choices": 2},
        "guessed": {"draft_len": 3},
        "read": {"read": Read(first=1, num_top=2)},
        "pooled": {"read": Read(pool=chance.choice(("mean", "cls", "last")))},
    }.get(kind, {})
    return Generate(request_id=name, model="tiny", prompt=prompt, sampling=params, **own)


def some_visits(chance: random.Random) -> list[list[Generate | Abort]]:
    visits: list[list[Generate | Abort]] = []
    for number in range(40):
        messages: list[Generate | Abort] = [some_request(str(number), chance)] if chance.random() < 0.5 else []
        if chance.random() < 0.1:
            messages.append(Abort(str(chance.randrange(number + 1))))
        visits.append(messages)
    return visits


def serve(name: str, visits: list[list[Generate | Abort]], num_blocks: int, *, is_ahead: bool) -> tuple[Answers, Lane]:
    config = CONFIGS[name]
    runner = build_runner(config, num_blocks)
    if is_ahead:
        runner.capture_graphs(MOST, RerunRecorder())
    sizes = (config.max_context, config.vocab_size, "float32", 1, num_blocks * BLOCK_SIZE, num_blocks, BLOCK_SIZE)
    info = ModelInfo("tiny", *sizes, pictures=config.pictures)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        groups=partition_layers(config).groups,
        max_batch_tokens=24,
        max_sequences=MOST,
        max_context=config.max_context,
        pictures=config.pictures,
    )
    lane = Lane(info, scheduler, runner, ahead=runner if is_ahead else None)
    mailbox = ListMailbox(visits)
    Engine([lane], mailbox, mailbox.clock).run()
    scheduler.check()
    answers: Answers = {}
    for event in mailbox.events:
        tokens, finish = answers.get((event.request_id, event.choice), ([], None))
        assert finish is None, "an event after the end"
        answers[event.request_id, event.choice] = ([*tokens, *event.tokens], event.finish)
    assert all(finish for _, finish in answers.values())
    assert scheduler.stats.kv_blocks_used == 0
    assert max(len(runner.sampler._seen), len(runner.reader._pooled)) <= MOST, "what was kept of sequences outlived them"
    return answers, lane


def check(name: str, seed: int, arm: Callable[[bool], None] = lambda is_armed: None) -> int:
    """How many choices ended as they would have; of the others what they had must be the beginning of it."""
    visits, num_blocks = some_visits(random.Random(seed)), 24 + 16 * (seed % 2)
    want, _ = serve(name, visits, num_blocks, is_ahead=False)
    arm(True)
    got, _ = serve(name, visits, num_blocks, is_ahead=True)
    arm(False)
    assert got.keys() == want.keys()
    num_whole = 0
    for key, (tokens, finish) in got.items():
        whole, its_finish = want[key]
        if finish in ("abort", "error") or its_finish == "abort":
            count = min(len(tokens), len(whole))
            assert tokens[:count] == whole[:count], (seed, key)
        else:
            assert (tokens, finish) == (whole, its_finish), (seed, key)
            num_whole += 1
    return num_whole


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_steps_one_by_one(name: str) -> None:
    assert check(name, 3) > 10


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns faults on and off, each of which ends a step: between what the host notes and what the device gets, in drawing, in waiting."""
    chance, is_on = random.Random(7), [False]

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        def fail_or(*arguments: Any, **keywords: Any) -> Any:
            if is_on[0] and chance.random() < 0.03:
                raise RuntimeError("told to fail")
            return call(*arguments, **keywords)

        return fail_or

    for place, what in ((graphs, "copy_into"), (state, "on_device"), (drawing.Drawing, "wait"), (Sampler, "_rows")):
        monkeypatch.setattr(place, what, faulty(getattr(place, what)))
    monkeypatch.setattr("service.engine.engine.MAX_FAILURES", 1000)
    return lambda armed: is_on.__setitem__(0, armed)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_that_fail_change_no_id_of_others(name: str, faults: Callable[[bool], None]) -> None:
    assert check(name, 5, faults) > 3


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_many_of_both(name: str, faults: Callable[[bool], None]) -> None:
    for seed in range(10, 20):
        assert check(name, seed) > 5
        assert check(name, seed, faults) > 0
