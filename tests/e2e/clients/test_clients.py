"""Real clients, each in an environment of its own, against a running Braid with real weights: only the base URL is changed.

An environment is made by pip or npm once and kept in the user's cache. The versions below are those that docs/clients.md was tried with.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.load import serving
from service.catalog import CATALOG, cache_folder, pull

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SCRIPTS = Path(__file__).parent / "scripts"
MODEL, EMBEDDER, KEY = "smollm2-135m-instruct", "all-minilm-l6-v2", "a-key-for-tests"
ANTHROPIC = ("anthropic==2.13.0",)
LANGCHAIN = ("langchain-openai==1.7.4", "openai==3.57.0")
LITELLM = ("litellm==1.110.2", "openai==3.57.0")
LLAMA_INDEX = ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0", "openai==2.54.0")
LLM = ("llm==0.36", "openai==3.57.0")
NODE = ("openai@7.57.0",)
_UNREACHABLE = re.compile(
    r"ConnectionError|Connection refused|NewConnectionError|Temporary failure in name|ENOTFOUND|ECONNREFUSED|ETIMEDOUT"
)


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pull(CATALOG[EMBEDDER])
    with serving(MODEL, [EMBEDDER, "--api-key", KEY, "--data-dir", str(tmp_path_factory.mktemp("data"))]) as (url, _):
        yield url


def _install(command: list[str], folder: Path) -> None:
    """Runs an installer; a registry that can't be reached skips the test, any other failure fails it."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        output = done.stdout + done.stderr
        if _UNREACHABLE.search(output):
            pytest.skip(f"the registry can't be reached: {output[-300:]}")
        pytest.fail(f"{' '.join(command[-3:])}: {output[-2000:]}")


def _folder(kind: str, requirements: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(" ".join((kind, sys.version, *requirements)).encode()).hexdigest()[:16]
    return cache_folder().parent / "test-clients" / f"{kind}-{digest}"


def python_with(*requirements: str) -> Path:
    folder = _folder("python", requirements)
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _install([sys.executable, "-m", "venv", str(folder)], folder)
        _install([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *requirements], folder)
        (folder / "ready").touch()
    return folder / "bin" / "python"


def node_with(*requirements: str) -> Path:
    """The folder whose node_modules hold the packages."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here")
    folder = _folder("node", requirements)
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}')
        _install(["npm", "install", "--no-audit", "--no-fund", *requirements], folder)
        (folder / "ready").touch()
    return folder


def environment(server: str, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "ANTHROPIC_", "PYTHON"))}
    return {**kept, "BASE_URL": server, "KEY": KEY, "MODEL": MODEL, "EMBEDDER": EMBEDDER, **more}


def run(command: list[str], server: str, folder: Path | None = None) -> dict[str, Any]:
    """What a client's script printed last."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(server), cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return seen


def test_openai_python(server: str) -> None:
    seen = run([sys.executable, str(SCRIPTS / "openai_python.py")], server)
    assert seen["models"] == [MODEL, EMBEDDER]
    assert "Paris" in seen["chat"]
    assert seen["chat"] == seen["stream"] == seen["asynchronous"]
    assert seen["tool"]["name"] == "get_weather"
    assert seen["tool"]["arguments"]["city"] in ("Paris", "Rome")
    assert 1 <= seen["tool"]["arguments"]["days"] <= 7
    assert seen["tool_stream"]["name"] == "get_weather"
    assert set(seen["tool_stream"]["parsed"]) == {"city", "days"}
    assert (seen["tool_stream"]["finish"], seen["tool_stream"]["calls"]) == ("tool_calls", 1)
    assert set(seen["parsed"]) == {"name", "age", "is_member"}
    assert seen["nearer"]
    assert seen["same"], "base64, which the client asks for unasked, holds the numbers of the list"
    assert seen["width"] == 384
    assert "Paris" in seen["response"]
    assert seen["kinds"] == ["response.created", "response.completed"]
    assert seen["chain"] == [True, True]
    assert seen["stored"]
    assert seen["response_parsed"] == "Person"
    assert "Paris" in seen["completion"]
    assert seen["batch"] == {"status": "completed", "counts": [1, 1], "good": seen["chat"], "bad": [400, "temperature"], "deleted": True}
    assert seen["errors"] == {
        "model": ["NotFoundError", "model_not_found", "model"],
        "key": ["AuthenticationError", "invalid_api_key", None],
        "value": ["BadRequestError", "invalid_value", "temperature"],
        "context": ["BadRequestError", "context_length_exceeded", "messages"],
    }


def test_the_quickstart_prints_what_it_says(server: str) -> None:
    """Its blocks of Python, one after the other. Numbers and what stands in quotes may be another machine's."""
    page = (Path(__file__).parents[3] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", page, re.DOTALL)
    assert sum(bool(printed) for _, printed in blocks) == 5
    scope: dict[str, Any] = {}
    for code, printed in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = code.replace("http://127.0.0.1:8000", server).replace('"any"', repr(KEY))
            exec(compile(code, "quickstart", "exec", dont_inherit=True), scope)
        vague = [re.sub(r"'[^']*'|[0-9.]*[0-9]", "_", text) for text in (output.getvalue(), printed)]
        assert vague[0] == vague[1], output.getvalue()


@pytest.mark.long
def test_openai_node(server: str) -> None:
    folder = node_with(*NODE)
    script = folder / "openai_node.mjs"
    script.write_bytes((SCRIPTS / "openai_node.mjs").read_bytes())  # node looks for packages beside the script
    seen = run(["node", str(script)], server, folder)
    assert seen["models"] == [MODEL, EMBEDDER]
    assert "Paris" in seen["chat"]
    assert seen["chat"] == seen["stream"] == seen["helper"]
    assert seen["tool"]["name"] == "get_weather"
    assert seen["tool"]["arguments"]["city"] in ("Paris", "Rome")
    assert seen["json"]["city"] in ("Paris", "Rome")
    assert seen["width"] == 384
    assert (seen["kinds"][0], seen["kinds"][-1]) == ("response.created", "response.completed")
    assert "Paris" in seen["response"]
    assert seen["errors"] == {"model": ["NotFoundError", "model_not_found"], "key": ["AuthenticationError", "invalid_api_key"]}
    assert seen["aborted"] == [1, 0], "sequences that ran before the loop was left, and soon after"


@pytest.mark.long
def test_anthropic_python(server: str) -> None:
    seen = run([str(python_with(*ANTHROPIC)), str(SCRIPTS / "anthropic_python.py")], server)
    assert "Paris" in seen["chat"]
    assert seen["chat"] == seen["stream"] == seen["final"]
    assert seen["stop"] in ("end_turn", "max_tokens")
    assert seen["usage"] == [True, True]
    assert seen["tool"]["name"] == "get_weather"
    assert seen["tool"]["input"]["city"] in ("Paris", "Rome")
    assert seen["tool"]["stop"] == "tool_use"
    assert seen["follow"] == "message"
    assert seen["count"] > 10
    assert seen["errors"] == {
        "model": ["NotFoundError", "not_found_error"],
        "key": ["AuthenticationError", "authentication_error"],
        "value": ["BadRequestError", "invalid_request_error"],
    }


@pytest.mark.long
def test_langchain(server: str) -> None:
    seen = run([str(python_with(*LANGCHAIN)), str(SCRIPTS / "langchain_python.py")], server)
    assert "Paris" in seen["chat"]
    assert seen["chat"] == seen["stream"] == seen["responses"]
    assert seen["tokens"] > 0
    assert (seen["tool"], seen["tool_stream"], seen["arguments"]) == ("add", "add", ["first", "second"])
    assert seen["after"] == "AIMessage"
    assert (seen["json_schema"], seen["function_calling"]) == ("Person", "Person")
    assert seen["width"] == [384, 384]
    assert seen["context"] == "OpenAIContextOverflowError"


@pytest.mark.long
def test_litellm(server: str) -> None:
    seen = run([str(python_with(*LITELLM)), str(SCRIPTS / "litellm_python.py")], server)
    for prefix in ("openai", "hosted_vllm"):
        assert "Paris" in seen[f"{prefix} chat"]
        assert seen[f"{prefix} chat"] == seen[f"{prefix} stream"]
        assert seen[f"{prefix} tool"] == {"city": "Paris"}
    assert seen["json"] == ["city"]
    assert seen["width"] == 384
    assert seen["response"] == "ResponsesAPIResponse"
    assert seen["errors"] == {
        "context": "ContextWindowExceededError",
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "value": "BadRequestError",
    }


@pytest.mark.long
def test_llama_index(server: str) -> None:
    seen = run([str(python_with(*LLAMA_INDEX)), str(SCRIPTS / "llama_index_python.py")], server)
    assert "Paris" in seen["chat"]
    assert seen["chat"] == seen["stream"]
    assert "Paris" in seen["complete"]
    assert seen["complete"] == seen["complete_stream"]
    assert seen["structured"] == "City"
    assert seen["tool"] == ["add", ["first", "second"]]
    assert seen["width"] == 384


@pytest.mark.long
def test_llm_command(server: str, tmp_path: Path) -> None:
    """The `llm` command line with Braid in its extra-openai-models.yaml."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: braid\n  model_name: {MODEL}\n  api_base: {server}/v1\n  api_key_name: braid\n"
        "  can_stream: true\n  supports_tools: true\n  supports_schema: true\n"
    )
    command = python_with(*LLM).parent / "llm"

    def llm(*arguments: str) -> tuple[str, str]:
        done = subprocess.run(
            [str(command), *arguments],
            capture_output=True,
            text=True,
            env=environment(server, LLM_USER_PATH=str(tmp_path)),
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, done.stderr

    llm("keys", "set", "braid", "--value", KEY)
    question = "What is the capital of France? Answer in one word."
    options = ["-m", "braid", "-o", "temperature", "0", "-o", "max_tokens", "16"]
    streamed, usage = llm("prompt", question, *options, "--usage")
    assert "Paris" in streamed
    assert re.search(r"[1-9]\d* input, [1-9]\d* output", usage), usage
    assert llm("prompt", question, *options, "--no-stream", "--usage") == (streamed, usage)
    properties = {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 20}}
    closed = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}
    greedy = ["-m", "braid", "-o", "temperature", "0", "-o", "max_tokens", "100"]
    shaped = json.loads(llm("prompt", "Name a dog.", *greedy, "--schema", json.dumps(closed))[0])
    assert list(shaped) == ["name", "age"]
    assert 0 <= shaped["age"] <= 20
    assert set(json.loads(llm("prompt", "Name a dog.", *greedy, "--schema", "name, age int")[0])) == {"name", "age"}
    llm("prompt", "What time is it?", *options, "-T", "llm_time")  # it can't demand a call, so only that the answer is read counts


@pytest.mark.long
def test_what_open_webui_sends(server: str) -> None:
    """Its requests as it sends them; the program itself is too large to install here."""
    import httpx

    with httpx.Client(base_url=server, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == [MODEL, EMBEDDER]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12}
        with client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line[6:]) for line in lines[:-1]]
        assert not any(chunk.get("timings", 0) is None or chunk.get("images", 0) is None for chunk in chunks)
        title = client.post("/v1/chat/completions", json={**body, "stream": False, "metadata": {"task": "title_generation"}})
        assert title.json()["choices"][0]["message"]["content"]
        assert client.post("/v1/embeddings", json={"model": EMBEDDER, "input": ["a", "b"]}).json()["data"][1]["index"] == 1
        ranked = client.post("/v1/rerank", json={"model": EMBEDDER, "query": "a pet", "documents": ["a train", "a cat"], "top_n": 1})
        assert ranked.json()["results"][0]["index"] == 1
