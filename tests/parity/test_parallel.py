"""Tensor parallelism with real processes and gloo: ids are those of one process, and the end of one rank is the end of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

import httpx
import psutil
import pytest
import torch

from bench.load import serving
from kernels.ops import select_ops
from service.engine.client import EngineClient
from service.engine.messages import Load, ModelSource
from service.errors import StartupError
from service.model.families import read_config
from service.model.transformer import Precision, build_transformer
from service.model.weights import open_weights
from service.scheduling.reading import Read
from tests.engine.test_client import collect, run, tokens, until
from tests.fakes import generate
from tests.parity.steps import Steps
from tests.runner.shares import FILES, TOKENS, write_folder

# Where the two likeliest logits of one process are closer than this, rounding decides, and the texts may part. Those of the random models
# here are about 0.4 wide.
TIE = 1e-4
PROMPTS = [TOKENS[:7], TOKENS[:20], TOKENS[20:], TOKENS[:23]]  # two share a block
NEW_TOKENS = 24


def load_of(folder: Path, size: int, dtype: Literal["float32", "bfloat16", "int8"] = "float32", device: str = "cpu") -> Load:
    """The model of a folder, or each that lies in a folder of it."""
    folders = sorted(folder.iterdir()) if not (folder / "config.json").exists() else [folder]
    return Load(
        models=tuple(ModelSource(each.name, str(each)) for each in folders),
        dtype=dtype,
        device=device,
        memory_bytes=2**24,
        max_context=0,
        max_batch_tokens=32,
        max_sequences=3,
        prefix_cache=True,
        threads=size,
        log_level="warning",
        tensor_parallel=size,
    )


@contextlib.asynccontextmanager
async def engine(load: Load) -> AsyncIterator[EngineClient]:
    """Afterwards no process is left."""
    client = EngineClient(load)
    try:
        await asyncio.wait_for(client.start(), 120)
        processes = followers_of(client)
        assert len(processes) == load.tensor_parallel - 1
        yield client
    finally:
        await asyncio.wait_for(client.close(), 20)
    assert client._process is not None
    assert client._process.returncode is not None
    await until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes))


def followers_of(client: EngineClient) -> list[psutil.Process]:
    assert client._process is not None
    return psutil.Process(client._process.pid).children(recursive=True)


async def answer(client: EngineClient, name: str) -> list[list[int]]:
    """Greedy ids of a model to all prompts, which come at once."""
    wanted = [generate(f"{name} {at}", prompt, model=name, max_tokens=NEW_TOKENS, temperature=0.0) for at, prompt in enumerate(PROMPTS)]
    return [tokens(events) for events in await asyncio.gather(*(collect(client.submit(each)) for each in wanted))]


def agreeing(folder: Path, prompt: Sequence[int], ids: Sequence[int]) -> int:
    """How many ids were compared with what one process would have drawn, up to the first tie; all of these are equal."""
    config = read_config(folder)
    model = build_transformer(config, open_weights(folder, config), select_ops("cpu"), precision=Precision(torch.float32))
    logits = Steps(model).run([(0, [*prompt, *ids])])[0][len(prompt) - 1 : -1]
    top = logits.topk(2)
    for position, token in enumerate(ids):
        if float(top.values[position, 0] - top.values[position, 1]) < TIE:
            return position
        assert token == int(top.indices[position, 0]), f"id {position} of the answer differs"
    return len(ids)


def check_ids(folder: Path, size: int, device: str = "cpu") -> None:
    load = load_of(folder, size, device=device)

    async def scenario() -> list[list[list[int]]]:
        async with engine(load) as client:
            return await asyncio.gather(*(answer(client, model.name) for model in load.models))

    for model, ids in zip(load.models, asyncio.run(scenario()), strict=True):
        assert [len(each) for each in ids] == [NEW_TOKENS] * len(PROMPTS)
        pairs = zip(PROMPTS, ids, strict=True)
        assert sum(agreeing(Path(model.path), *pair) for pair in pairs) > NEW_TOKENS * len(PROMPTS) / 2


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    check_ids(write_folder(tmp_path / "it", "qwen2"), 2)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
def test_several_models_answer_as_in_one_process(tmp_path: Path, size: int) -> None:
    """With two K/V heads or eight, with biases, with norms of many kinds; at once, so that steps of all of them alternate."""
    for family in FILES:
        write_folder(tmp_path / family, family)
    check_ids(tmp_path, size)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_answer_as_one_process(tmp_path: Path) -> None:
    check_ids(write_folder(tmp_path / "it", "qwen2"), 2, "cuda")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_log_probabilities_are_close_in_narrower_types(tmp_path: Path, dtype: Literal["bfloat16", "int8"]) -> None:
    """Of a prompt's own ids, so that no drawn id decides what is compared; against one process in float32."""
    folder = write_folder(tmp_path / "it", "llama")

    async def scenario(load: Load) -> list[float]:
        async with engine(load) as client:
            wanted = generate("a", TOKENS, model="it", max_tokens=1, read=Read(first=1))
            readings = [event.reading for event in await collect(client.submit(wanted)) if event.reading is not None]
            return [each.logprob for each in readings[0].logprobs]

    exact = torch.tensor(asyncio.run(scenario(load_of(folder, 1))))
    alone, split = (torch.tensor(asyncio.run(scenario(load_of(folder, size, dtype)))) for size in (1, 2))
    assert len(exact) == len(TOKENS) - 1
    assert float((alone - exact).abs().max()) > 0
    assert float((split - exact).square().mean().sqrt()) <= 1.25 * float((alone - exact).square().mean().sqrt())


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_ends_every_request(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM is for the server: a rank does not listen to it, so nothing happens."""
    folder = write_folder(tmp_path / "it", "llama")

    async def scenario() -> None:
        async with engine(load_of(folder, 2)) as client:
            streams = [client.submit(generate(str(at), TOKENS[: 5 + at], model="it", max_tokens=90)) for at in range(6)]
            first = aiter(streams[0])
            assert (await anext(first)).finish is None
            (follower,) = followers_of(client)
            os.kill(follower.pid, number)
            ends = [[event async for event in first][-1], *[(await collect(stream))[-1] for stream in streams[1:]]]
            if number == signal.SIGTERM:
                assert {end.finish for end in ends} == {"length"}
                assert client.health().state == "ready"
                return
            assert all(end.finish in ("error", "length") for end in ends)
            assert "error" in {end.finish for end in ends}
            await until(client.dead.is_set)
            assert client.health().state == "dead"
            assert client.health().detail == "rank 1 of 2 ended unexpectedly (status -9)"

    run(scenario())


@pytest.mark.long
def test_the_death_of_the_engine_leaves_no_rank(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it", "llama")

    async def scenario() -> None:
        async with engine(load_of(folder, 2)) as client:
            stream = client.submit(generate("a", TOKENS[:5], model="it", max_tokens=90))
            assert client._process is not None
            client._process.kill()
            assert (await collect(stream))[-1].finish == "error"

    run(scenario())


@pytest.mark.long
def test_a_rank_that_stands_still_is_a_stall(tmp_path: Path) -> None:
    """Nothing ends while it does; when it goes on, so does everything, with the same ids."""
    folder = write_folder(tmp_path / "it", "llama")

    async def scenario() -> None:
        async with engine(load_of(folder, 2)) as client:
            (want,) = [tokens(await collect(client.submit(generate("a", TOKENS[:5], model="it", max_tokens=40))))]
            (follower,) = followers_of(client)
            follower.suspend()
            stream = client.submit(generate("b", TOKENS[:5], model="it", max_tokens=40))
            await until(lambda: client.health().state == "stalled")
            follower.resume()
            assert tokens(await collect(stream)) == want
            await until(lambda: client.health().state == "ready")

    run(scenario())


@pytest.mark.long
def test_what_can_not_be_split_ends_the_start(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it", "llama")

    async def scenario() -> None:
        client = EngineClient(load_of(folder, 3))
        with pytest.raises(StartupError, match=r"--tensor-parallel 3 can't split it, .* it allows 1, 2, 4, 8"):
            await client.start()
        await client.close()

    run(scenario())


NANO = "braid-nano"


@pytest.mark.long
def test_over_http(tmp_path: Path) -> None:
    """The model that ships, with pictures: the same words and codes as from one process, then the death of a rank."""

    def ask(url: str) -> list[str]:
        found = []
        for prompt in ("hello", "What is a turtle?"):
            body = {"model": NANO, "messages": [{"role": "user", "content": prompt}], "max_tokens": 40, "temperature": 0}
            found.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()["choices"][0]["message"])
        image = {"prompt": "cat face, noto style", "seed": 4, "response_format": "b64_json"}
        found.append(httpx.post(f"{url}/v1/images/generations", json=image, timeout=60).raise_for_status().json()["data"][0]["b64_json"])
        return found

    arguments = [NANO, "--dtype", "float32", "--data-dir", "off", "--threads", "1"]
    with serving("", arguments) as (url, _):
        want = ask(url)
    with serving("", [*arguments, "--tensor-parallel", "2"]) as (url, _):
        assert ask(url) == want
        server = next(each for each in psutil.Process().children() if url.rpartition(":")[2] in each.cmdline())
        follower = next(each for each in server.children(recursive=True) if "service.follower" in each.cmdline())
        follower.kill()
        with contextlib.suppress(httpx.TransportError):  # it may be gone already
            while httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                time.sleep(0.01)
        assert server.wait(20) == 1
