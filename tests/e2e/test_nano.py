"""Braid's own model, as it ships, behind the server: it talks, samples as its files say, and its codes never come out as text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from bench.load import serving

pytestmark = pytest.mark.e2e
NAME = "braid-nano"
PROMPTS = ("hello", "What is a turtle?", "cat face, noto style", "Draw a big red star in row 1, column 2, on sand.")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving("", [NAME, "--data-dir", str(tmp_path_factory.mktemp("data"))]) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, prompt: str, **more: Any) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": prompt}], max_tokens=96, **more)


def test_it_is_the_first_model_and_knows_its_context(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.model_dump()["max_model_len"] == 512


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_answers_and_a_seed_repeats(client: openai.OpenAI, prompt: str) -> None:
    first, second = (ask(client, prompt, seed=5) for _ in range(2))
    choice = first.choices[0]
    assert choice.finish_reason in ("stop", "length")
    assert "<|" not in (choice.message.content or "")
    assert choice.message.content == second.choices[0].message.content
    assert first.usage
    assert first.usage.completion_tokens > 0


def test_in_a_crowd_it_says_what_it_says_alone(client: openai.OpenAI) -> None:
    prompts = [f"{prompt} {number}" for number, prompt in enumerate(PROMPTS * 4)]
    alone = [ask(client, prompt, temperature=0).choices[0].message.content for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        crowd = list(pool.map(lambda prompt: ask(client, prompt, temperature=0).choices[0].message.content, prompts))
    assert crowd == alone


def test_pictures_that_were_let_in_are_finished_while_the_server_drains(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Their codes are drawn, refined and turned into pixels after the signal."""
    with serving("", [NAME, "--data-dir", str(tmp_path_factory.mktemp("data"))]) as (url, _), ThreadPoolExecutor(1) as pool:
        port = url.rpartition(":")[2]
        (server,) = [each for each in psutil.Process().children() if port in each.cmdline()]
        body = {"prompt": "cat face, noto style", "n": 10, "refine": 2, "guidance_scale": 2.0}
        answer = pool.submit(httpx.post, f"{url}/v1/images/generations", json=body, timeout=60)
        while "num_requests_running" not in (text := httpx.get(f"{url}/metrics").text) or " 0.0" in _line(text, "num_requests_running"):
            assert not answer.done(), "it was over before the signal"
        server.terminate()
        found = answer.result()
        assert found.status_code == 200, found.text
        assert len(found.json()["data"]) == 10


def _line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"braid:{name}{{"))


def test_a_prompt_beyond_its_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="512"):
        ask(client, "big red star " * 400)
