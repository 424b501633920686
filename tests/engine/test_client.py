"""The client with a real engine process around a scripted runner: streams, refusals, deaths, stalls, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import psutil
import pytest

from service.engine.client import EngineClient
from service.engine.mailbox import FrameSplitter, encode_frame
from service.engine.messages import Delivery, Event, Load, ModelSource, Vocabulary
from service.engine.stream import Stream, error_of
from service.errors import ModelNotFoundError, OverloadedError, RequestError, StartupError, UnavailableError
from tests.fakes import FAIL_FORWARD, HANG, generate, scripted_tokens

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0


def load_of(*names: str, **others: object) -> Load:
    fields = {"dtype": "auto", "device": "cpu", "memory_bytes": 0, "max_context": 0, "max_batch_tokens": 64, "max_sequences": 8}
    models = tuple(ModelSource(name=name, path="") for name in names or ("tiny",))
    return Load(models=models, prefix_cache=True, **(fields | others))


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tests.fake_worker", *options]


@contextlib.asynccontextmanager
async def engine(*options: str, load: Load | None = None, **others: object) -> AsyncIterator[EngineClient]:
    """A started client; afterwards nothing may be left in flight, and the process must be gone."""
    client = EngineClient(load or load_of(), command=command(*options), **others)
    try:
        await asyncio.wait_for(client.start(), PATIENCE_S)
        yield client
    finally:
        await asyncio.wait_for(client.close(), PATIENCE_S)
    assert (client.num_in_flight, client.tokens_in_flight, client._streams) == (0, 0, {})
    assert client._process.returncode is not None


def run(scenario: Coroutine[object, object, object]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.02)


async def collect(stream: Stream) -> list[Event]:
    return [event async for event in stream]


async def finish_of(stream: Stream) -> str:
    return (await collect(stream))[-1].finish


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [token for event in events if event.choice == choice for token in event.tokens]


def test_choices_and_models_stream_side_by_side() -> None:
    async def scenario() -> None:
        async with engine(load=load_of("one", "two")) as client:
            assert client.health().state == "ready"
            assert set(client.models()) == {"one", "two"}
            streams = [
                client.submit(generate("a", [5, 6], n=3, seed=9, max_tokens=20, model="one")),
                client.submit(generate("b", [7], max_tokens=30, model="two")),
            ]
            first, second = await asyncio.gather(*map(collect, streams))
            for choice in range(3):
                assert tokens(first, choice) == scripted_tokens([5, 6], 20, seed=9 + choice)
            assert tokens(second) == scripted_tokens([7], 30)
            assert sorted(event.choice for event in first if event.finish == "length") == [0, 1, 2]
            assert client.stats()["two"].generation_tokens == 30
        assert client._process.returncode == 0

    run(scenario())


def test_the_http_process_loads_no_torch() -> None:
    check = "import sys, service.engine.client; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_a_worker_without_a_model_loads_no_torch() -> None:
    check = "import sys, service.worker; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_a_vocabulary_is_sent_once_and_grammars_compile_in_the_engine() -> None:
    calls = 0

    def vocabulary() -> Vocabulary:
        nonlocal calls
        calls += 1
        return Vocabulary("tiny", [bytes([token % 256]) for token in range(1000)], [], [0])

    async def scenario() -> None:
        async with engine() as client:
            with pytest.raises(ValueError, match="vocabulary"):
                client.submit(generate("early", grammar='start: "a"\n'))
            for _ in range(2):
                client.teach("tiny", vocabulary)
            refused = client.submit(generate("bad", n=2, grammar="start: <<", grammar_param="structured_outputs.grammar"))
            # The scripted runner minds no mask, so what it draws does not fit; that ends this request and nothing else.
            astray = client.submit(generate("astray", grammar='start: "a"\n'))
            free = client.submit(generate("free", [7], max_tokens=20))
            events = await collect(refused)
            errors = [error_of(event) for event in events]
            assert [(error.status, error.param, error.code) for error in errors] == [
                (400, "structured_outputs.grammar", "invalid_grammar")
            ] * 2
            assert (await collect(astray))[-1].error == "the grammar could not follow the answer"
            assert tokens(await collect(free)) == scripted_tokens([7], 20)
        assert calls == 1

    run(scenario())


def test_what_is_refused_before_the_engine() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.02", max_requests_in_flight=3, max_tokens_in_flight=100) as client:
            with pytest.raises(ModelNotFoundError):
                client.submit(generate("a", model="nobody"))
            with pytest.raises(RequestError):
                client.submit(generate("a", seed=2**70))
            with pytest.raises(RequestError):
                client.submit(generate("a", n=10**9))
            streams = [client.submit(generate(str(i), [1] * 30, max_tokens=40)) for i in range(3)]
            with pytest.raises(ValueError, match="in flight"):
                client.submit(generate("0"))
            with pytest.raises(OverloadedError) as refused:
                client.submit(generate("d"))
            assert refused.value.retry_after_s >= 1
            streams[0].abort()
            assert await finish_of(streams[0]) == "abort"
            with pytest.raises(OverloadedError, match="tokens"):
                client.submit(generate("e", [1] * 50))
            fits = client.submit(generate("f", [1], max_tokens=1))
            assert await finish_of(fits) == "length"
            assert [await finish_of(stream) for stream in streams[1:]] == ["length", "length"]

    run(scenario())


def test_a_bad_request_and_a_failed_step_reach_only_their_own_streams() -> None:
    async def scenario() -> None:
        async with engine() as client:
            good = client.submit(generate("good", max_tokens=100))
            bad = client.submit(generate("bad", [5000]))
            wrong = client.submit(generate("wrong", ["one"]))
            assert (await collect(bad))[-1].error_status == 400
            assert (await collect(wrong))[-1].error_status == 400
            assert tokens(await collect(good)) == scripted_tokens([1, 2, 3], 100)
            failed = client.submit(generate("failed", [FAIL_FORWARD], n=2))
            assert [event.finish for event in await collect(failed)] == ["error", "error"]
            assert await finish_of(client.submit(generate("after"))) == "length"

    run(scenario())


def test_deadlines_hold_in_the_queue() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.02", load=load_of(max_sequences=1)) as client:
            long = client.submit(generate("long", max_tokens=200))
            queued = client.submit(generate("queued", timeout_s=0.2))
            events = await collect(queued)
            assert [(event.tokens, event.finish) for event in events] == [([], "deadline")]
            assert not long.is_finished
            long.leave()
            await until(lambda: client.num_in_flight == 0)

    run(scenario())


def test_a_reader_that_leaves_frees_its_blocks() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.01") as client:
            async for _ in client.submit(generate("break", max_tokens=400)):
                break
            cancelled = asyncio.create_task(collect(client.submit(generate("cancel", max_tokens=400))))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            await until(lambda: client.num_in_flight == 0)
            assert (client.stats()["tiny"].running, client.stats()["tiny"].kv_blocks_used) == (0, 0)
            assert client.stats()["tiny"].generation_tokens < 400

    run(scenario())


def test_an_abort_storm_ends_each_request_once() -> None:
    ends: dict[tuple[str, int], int] = {}

    def count(delivery: Delivery) -> None:
        for event in delivery.events:
            if event.finish:
                ends[event.request_id, event.choice] = ends.get((event.request_id, event.choice), 0) + 1

    async def one(client: EngineClient, number: int, chance: random.Random) -> None:
        stream = client.submit(generate(str(number), [number] * 20, n=1 + number % 3, max_tokens=60))
        leave_after = chance.randrange(8) if number % 2 else 10_000
        seen = 0
        async for event in stream:
            seen += 1
            if chance.random() < 0.1:
                stream.abort(event.choice, finished=True)
            if seen > leave_after:
                break

    async def scenario() -> None:
        chance = random.Random(0)
        async with engine("--num-blocks", "24") as client:
            client.on_delivery.append(count)
            await asyncio.gather(*(one(client, number, chance) for number in range(60)))
            await until(lambda: client.num_in_flight == 0)
            await until(lambda: client.stats()["tiny"].kv_blocks_used == 0)
        assert ends == {(str(number), choice): 1 for number in range(60) for choice in range(1 + number % 3)}

    run(scenario())


def test_a_listener_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(delivery: Delivery) -> None:
        raise KeyError("metrics")

    async def scenario() -> None:
        async with engine() as client:
            client.on_delivery.append(fail)
            assert await finish_of(client.submit(generate("a"))) == "length"

    run(scenario())
    assert "a listener to deliveries failed" in caplog.text


def test_killing_the_engine_ends_every_stream_at_once() -> None:
    ends: list[Event] = []

    async def scenario() -> None:
        async with engine("--step-s", "0.01") as client:
            client.on_delivery.append(lambda delivery: ends.extend(event for event in delivery.events if event.finish))
            readers = [asyncio.create_task(collect(client.submit(generate(str(i), n=2, max_tokens=400)))) for i in range(3)]
            await until(lambda: client.stats().get("tiny") and client.stats()["tiny"].generation_tokens > 0)
            os.kill(client._process.pid, signal.SIGKILL)
            killed_at = time.monotonic()
            for events in await asyncio.gather(*readers):
                finished = [event for event in events if event.finish]
                assert [(event.finish, event.error_status) for event in finished] == [("error", 500)] * 2
            assert time.monotonic() - killed_at < 2
            assert client.dead.is_set()
            assert client.health().state == "dead"
            with pytest.raises(UnavailableError):
                client.submit(generate("late"))
        assert sorted((event.request_id, event.choice) for event in ends) == [(str(i), choice) for i in range(3) for choice in range(2)]

    run(scenario())


def test_steps_that_keep_failing_end_the_engine_with_a_reason() -> None:
    async def scenario() -> None:
        async with engine() as client:
            for number in range(30):
                with contextlib.suppress(UnavailableError):
                    assert await finish_of(client.submit(generate(str(number), [FAIL_FORWARD]))) == "error"
            await asyncio.wait_for(client.dead.wait(), PATIENCE_S)
            assert "in a row" in client.health().detail

    run(scenario())


def test_a_stopped_engine_is_stalled_and_recovers() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.01") as client:
            reader = asyncio.create_task(collect(client.submit(generate("a", max_tokens=300))))
            os.kill(client._process.pid, signal.SIGSTOP)
            await until(lambda: client.health().state == "stalled")
            with pytest.raises(UnavailableError):
                client.submit(generate("b"))
            os.kill(client._process.pid, signal.SIGCONT)
            await until(lambda: client.health().state == "ready")
            assert tokens(await reader) == scripted_tokens([1, 2, 3], 300)
            assert client.num_stalls == 1

    run(scenario())


def test_a_step_that_takes_too_long_is_a_stall_and_ends_by_the_option() -> None:
    async def scenario() -> None:
        async with engine(stall_exit_s=4.0) as client:
            assert await finish_of(client.submit(generate("quick"))) == "length"
            stuck = asyncio.create_task(collect(client.submit(generate("stuck", [HANG, 1]))))
            await until(lambda: client.health().state == "stalled")
            assert not stuck.done()
            assert [event.finish for event in await stuck] == ["error"]
            assert "stalled" in client.health().detail
            assert client.dead.is_set()

    run(scenario())


def test_drain_lets_finish_what_can_and_ends_the_rest() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.01") as client:
            short = asyncio.create_task(collect(client.submit(generate("short", max_tokens=5))))
            long = asyncio.create_task(collect(client.submit(generate("long", max_tokens=500))))
            drained = asyncio.create_task(client.drain(0.5))
            await asyncio.sleep(0)
            assert client.health().state == "draining"
            with pytest.raises(UnavailableError):
                client.submit(generate("late"))
            assert (await short)[-1].finish == "length"
            assert not await drained
            assert ((await long)[-1].finish, (await long)[-1].error_status) == ("error", 503)
        assert client._process.returncode == 0
        assert not client.dead.is_set()

    run(scenario())


def test_drain_without_work_is_at_once() -> None:
    async def scenario() -> None:
        async with engine() as client:
            assert await client.drain(0.0)

    run(scenario())


def test_an_end_that_comes_after_the_drain_is_counted_once() -> None:
    ends: list[Event] = []

    async def scenario() -> None:
        async with engine("--step-s", "0.05") as client:
            client.on_delivery.append(lambda delivery: ends.extend(event for event in delivery.events if event.finish))
            client.submit(generate("a", max_tokens=400))
            await client.drain(0.1)
            await until(lambda: client.stats()["tiny"].running == 0)
        assert [(event.request_id, event.finish) for event in ends] == [("a", "error")]

    run(scenario())


@pytest.mark.parametrize(("start", "words"), [("refuse", "not what they say"), ("crash", "could not start (KeyError)")])
def test_a_start_that_fails_says_why(start: str, words: str) -> None:
    async def scenario() -> None:
        with pytest.raises(StartupError) as failed:
            async with engine("--start", start):
                pass
        assert words in failed.value.message
        assert "nobody expected" not in failed.value.message

    run(scenario())


def test_a_program_that_is_not_there_is_a_failed_start() -> None:
    async def scenario() -> None:
        client = EngineClient(load_of(), command=["/nonexistent/engine"])
        with pytest.raises(StartupError):
            await client.start()
        assert client.health().state == "dead"
        await client.close()

    run(scenario())


def test_closing_while_it_loads_is_quick() -> None:
    async def scenario() -> None:
        client = EngineClient(load_of(), command=command("--start", "hang"))
        starting = asyncio.create_task(client.start())
        await until(lambda: client.health().progress == 0.25)
        assert client.health().state == "loading"
        with pytest.raises(UnavailableError):
            client.submit(generate("early"))
        closed_at = time.monotonic()
        await client.close()
        assert time.monotonic() - closed_at < 5
        with pytest.raises(StartupError):
            await starting
        assert client._process.returncode == -signal.SIGKILL

    run(scenario())


def test_ctrl_c_and_term_are_left_to_the_parent() -> None:
    async def scenario() -> None:
        async with engine("--step-s", "0.01") as client:
            reader = asyncio.create_task(collect(client.submit(generate("a", max_tokens=50))))
            await until(lambda: client.stats())
            os.kill(client._process.pid, signal.SIGINT)
            os.kill(client._process.pid, signal.SIGTERM)
            assert tokens(await reader) == scripted_tokens([1, 2, 3], 50)

    run(scenario())


PARENT = """
import asyncio, sys
from service.engine.client import EngineClient
from tests.engine.test_client import command, load_of
from tests.fakes import HANG, generate

async def main():
    client = EngineClient(load_of(), command=command())
    await client.start()
    client.submit(generate("a", [HANG]))
    await asyncio.sleep(0.3)
    print(client._process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_engine_dies_with_its_parent_even_in_a_stuck_step() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        worker.wait(timeout=PATIENCE_S)
    assert not worker.is_running()


def test_a_lost_line_ends_the_engine_even_in_a_stuck_step() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen([*command(), "--fd", str(theirs.fileno())], cwd=ROOT, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        ours.settimeout(PATIENCE_S)
        ours.sendall(encode_frame(load_of()) + encode_frame(generate("a", [HANG])))
        splitter, bodies = FrameSplitter(), []
        while not any(b"step_age_s" in body for body in bodies):
            bodies += splitter.split(ours.recv(1 << 16))
        ours.close()
        assert process.wait(PATIENCE_S) == 1


def test_a_reader_of_nothing_does_not_stop_the_others() -> None:
    async def scenario() -> None:
        async with engine() as client:
            idle = client.submit(generate("idle", n=4, max_tokens=400))
            assert tokens(await collect(client.submit(generate("busy", max_tokens=300)))) == scripted_tokens([1, 2, 3], 300)
            await until(lambda: idle.is_finished)
            assert len(tokens(await collect(idle), 3)) == 400

    run(scenario())
