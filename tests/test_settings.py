"""Every setting from flag, environment and file, in that order of precedence, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from service.cli import serve
from service.settings import Settings, format_bytes, make_settings, serve_options

# Flag, environment variable, a value that is not the default, and the field it becomes. Flags are a promise: renaming one is a change
# that people must be told of.
KNOBS: list[tuple[str, str, str, str, Any]] = [
    ("--host", "BRAID_HOST", "0.0.0.0", "host", "0.0.0.0"),
    ("--port", "BRAID_PORT", "9", "port", 9),
    ("--dtype", "BRAID_DTYPE", "float32", "dtype", "float32"),
    ("--kv-dtype", "BRAID_KV_DTYPE", "int8", "kv_dtype", "int8"),
    ("--device", "BRAID_DEVICE", "cuda:1", "device", "cuda:1"),
    ("--memory", "BRAID_MEMORY", "1.5GiB", "memory", 3 * 2**29),
    ("--max-context", "BRAID_MAX_CONTEXT", "4096", "max_context", 4096),
    ("--max-batch-tokens", "BRAID_MAX_BATCH_TOKENS", "64", "max_batch_tokens", 64),
    ("--max-prefill-ms", "BRAID_MAX_PREFILL_MS", "0", "max_prefill_ms", 0),
    ("--max-sequences", "BRAID_MAX_SEQUENCES", "3", "max_sequences", 3),
    ("--deterministic", "BRAID_DETERMINISTIC", "1", "deterministic", True),
    ("--draft-model", "BRAID_DRAFT_MODEL", "small.gguf", "draft_model", "small.gguf"),
    ("--tensor-parallel", "BRAID_TENSOR_PARALLEL", "2", "tensor_parallel", 2),
    ("--async-scheduling", "BRAID_ASYNC_SCHEDULING", "on", "async_scheduling", "on"),
    ("--threads", "BRAID_THREADS", "1", "threads", 1),
    ("--api-key", "BRAID_API_KEYS", "sk-secret-1", "api_keys", ("sk-secret-1",)),
    ("--allowed-host", "BRAID_ALLOWED_HOSTS", "braid.example", "allowed_hosts", ("braid.example",)),
    ("--strict", "BRAID_STRICT", "1", "strict", True),
    ("--metrics-prefix", "BRAID_METRICS_PREFIX", "vllm", "metrics_prefix", "vllm"),
    ("--drain-timeout", "BRAID_DRAIN_TIMEOUT_S", "2.5", "drain_timeout_s", 2.5),
    ("--stall-exit", "BRAID_STALL_EXIT_S", "60", "stall_exit_s", 60.0),
    ("--max-queue-requests", "BRAID_MAX_QUEUE_REQUESTS", "7", "max_queue_requests", 7),
    ("--max-queue-tokens", "BRAID_MAX_QUEUE_TOKENS", "700", "max_queue_tokens", 700),
    ("--max-body", "BRAID_MAX_BODY_BYTES", "64KiB", "max_body_bytes", 65_536),
    ("--max-image", "BRAID_MAX_IMAGE_BYTES", "1MiB", "max_image_bytes", 2**20),
    ("--max-image-pixels", "BRAID_MAX_IMAGE_PIXELS", "4096", "max_image_pixels", 4096),
    ("--media-host", "BRAID_MEDIA_HOSTS", "pictures.example", "media_hosts", ("pictures.example",)),
    ("--allow-origin", "BRAID_ALLOW_ORIGINS", "https://a.example", "allow_origins", ("https://a.example",)),
    ("--data-dir", "BRAID_DATA_DIR", "off", "data_dir", "off"),
    ("--max-file", "BRAID_MAX_FILE_BYTES", "64KiB", "max_file_bytes", 65_536),
    ("--max-data", "BRAID_MAX_DATA_BYTES", "1GiB", "max_data_bytes", 2**30),
    ("--batch-requests", "BRAID_BATCH_REQUESTS", "3", "batch_requests", 3),
    ("--max-prepared", "BRAID_MAX_PREPARED_BYTES", "1GiB", "max_prepared_bytes", 2**30),
    ("--log-level", "BRAID_LOG_LEVEL", "debug", "log_level", "debug"),
]
Read = Callable[..., Settings]


def run(*arguments: str, **environment: str) -> tuple[Result, list[Settings]]:
    seen: list[Settings] = []

    @click.command(context_settings={"auto_envvar_prefix": "BRAID"})
    @serve_options
    def command(**values: Any) -> None:
        seen.append(make_settings(values))

    return CliRunner().invoke(command, list(arguments), env=environment), seen


def settings_of(*arguments: str, **environment: str) -> Settings:
    result, seen = run(*arguments, **environment)
    assert result.exit_code == 0, result.output
    return seen[0]


def refusal_of(*arguments: str, **environment: str) -> str:
    result, seen = run(*arguments, **environment)
    assert (result.exit_code, seen) == (2, [])
    return " ".join(result.output.replace("│", " ").split())


def test_nothing_said_is_the_default() -> None:
    assert settings_of() == Settings()


@pytest.mark.parametrize(("flag", "variable", "text", "name", "value"), KNOBS, ids=[knob[0] for knob in KNOBS])
def test_flag_and_environment(flag: str, variable: str, text: str, name: str, value: Any) -> None:
    assert getattr(Settings(), name) != value
    assert getattr(settings_of(flag, *([] if value is True else [text])), name) == value
    assert getattr(settings_of(**{variable: text}), name) == value


def test_switches() -> None:
    assert settings_of("--no-prefix-cache").prefix_cache is False
    assert settings_of(BRAID_PREFIX_CACHE="0").prefix_cache is False
    assert settings_of("--prefix-cache", BRAID_PREFIX_CACHE="0").prefix_cache is True


def test_every_field_has_a_flag_and_every_flag_a_field() -> None:
    names = {each.name for each in fields(Settings)}
    assert {knob[3] for knob in KNOBS} | {"models", "prefix_cache", "api_key_file"} == names
    assert {parameter.name for parameter in serve.params} == names | {"config"}


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert Settings().data_folder == Path("/somewhere/braid")
    assert Settings(data_dir="here").data_folder == Path("here")
    assert Settings(data_dir="off").data_folder is None
    monkeypatch.delenv("XDG_DATA_HOME")
    assert Settings().data_folder == Path.home() / ".local" / "share" / "braid"


def test_several_values() -> None:
    assert settings_of("--api-key", "12345678", "--api-key", "abcdefgh").api_keys == ("12345678", "abcdefgh")
    assert settings_of(BRAID_API_KEYS="12345678, abcdefgh").api_keys == ("12345678", "abcdefgh")
    assert settings_of("a", "b", BRAID_MODELS="c").models == ("a", "b")
    assert settings_of(BRAID_MODELS="c d").models == ("c", "d")


def config_file(folder: Path, text: str) -> str:
    path = folder / "braid.toml"
    path.write_text(text)
    return str(path)


def test_precedence(tmp_path: Path) -> None:
    path = config_file(tmp_path, 'port = 1\nmax_context = 4\nthreads = 1\nmodels = ["m"]\nprefix_cache = false\nmemory = "2GiB"\n')
    found = settings_of("--config", path, "--port", "3", BRAID_PORT="2", BRAID_MAX_CONTEXT="2")
    assert (found.port, found.max_context, found.threads, found.models) == (3, 2, 1, ("m",))
    assert (found.prefix_cache, found.memory, found.max_sequences) == (False, 2**31, 64)
    assert settings_of("--config", path, "n").models == ("n",)
    assert settings_of(BRAID_CONFIG=path).port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_contxt = 1", "sets max_contxt, which is not a setting; do you mean max_context?"),
        ("zzz = 1", "sets zzz, which is not a setting; there are allow_origins"),
        ("config = 'x'", "which is not a setting"),
        ("port = true", "sets port to true or false, which it can't be"),
        ("port = 1.5", "sets port to a fraction"),
        ("port = [1]", "sets port to a list"),
        ("port = 70000", "70000 is not in the range"),
        ("port = 'http'", "'http' is not a valid integer"),
        ("models = 'm'", "sets models to a single value; it takes a list"),
        ("models = [1]", "sets models to a list that holds something other than text"),
        ("prefix_cache = 'no'", "sets prefix_cache to something other than true or false"),
        ("host = 1979-05-27", "sets host to a table or a date"),
        ("[port]\nx = 1", "sets port to a table"),
        ("port 1", "can't be read"),
        ("drain_timeout_s = nan", "not a number of seconds"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal_of("--config", config_file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "can't be read: No such file" in refusal_of("--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--port", "65536", "not in the range"),
        ("--port", "-1", "not in the range"),
        ("--max-batch-tokens", "0", "not in the range"),
        ("--max-prefill-ms", "-1", "not in the range"),
        ("--max-sequences", "0", "not in the range"),
        ("--max-context", "-1", "not in the range"),
        ("--memory", "lots", "'lots' is not a size"),
        ("--memory", "-1", "is not a size"),
        ("--memory", "4XB", "is not a size"),
        ("--memory", "9" * 30, "is not a size"),
        ("--memory", "9000TiB", "out of range"),
        ("--max-body", "12", "out of range; at least 1.0 KiB"),
        ("--dtype", "int2", "is not one of"),
        ("--kv-dtype", "int4", "is not one of"),
        ("--device", "tpu", "there are auto, cpu, cuda and cuda:N"),
        ("--drain-timeout", "nan", "is not a number of seconds"),
        ("--drain-timeout", "inf", "is not a number of seconds"),
        ("--drain-timeout", "-1", "is not a number of seconds"),
        ("--stall-exit", "1", "0 or at least 2 seconds"),
        ("--max-context", "1", "0 (the model's own) or at least 2"),
        ("--allowed-host", "http://a", "a host name or an address without a port"),
        ("--api-key-file", "/no/such/file", "can't be read: No such file"),
        ("--threads", "1000", "more than four for each"),
        ("--host", "a b", "a host name or an address"),
        ("--allow-origin", "example.org", "an origin such as"),
        ("--log-level", "loud", "is not one of"),
    ],
)
def test_values_that_are_refused(flag: str, value: str, message: str) -> None:
    assert message in refusal_of(flag, value)


def test_a_bad_key_is_not_repeated() -> None:
    answer = refusal_of("--api-key", "häßlich-geheim")
    assert "a key of 8 to 512 visible ASCII characters" in answer
    assert "geheim" not in answer
    assert "12345678" not in repr(settings_of("--api-key", "12345678"))


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = key_file(tmp_path, "# of the laptop\nsk-laptop-1  # since May\n\n  sk-with#inside\n")
    assert settings_of("--api-key-file", path).api_keys == ("sk-laptop-1", "sk-with#inside")
    assert settings_of("--api-key", "sk-first-1", BRAID_API_KEY_FILE=path).api_keys == ("sk-first-1", "sk-laptop-1", "sk-with#inside")
    toml = config_file(tmp_path, f'api_key_file = "{path}"\n')
    assert settings_of("--config", toml).api_keys == ("sk-laptop-1", "sk-with#inside")


@pytest.mark.parametrize(("mode", "is_warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_key_file_that_others_can_read_is_warned_about(tmp_path: Path, mode: int, is_warned: bool) -> None:
    result, _ = run("--api-key-file", key_file(tmp_path, "sk-secret-1\n", mode))
    assert result.exit_code == 0
    assert ("everybody on this machine" in result.output) == is_warned
    assert "sk-secret-1" not in result.output


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "sk-good-key-1\nshort\n", "sk-good-key-1\nhäßlich-geheim\n", "sk-good key-1\n"])
def test_key_files_that_are_refused(tmp_path: Path, text: str) -> None:
    """Not one key of a file is lost in silence, and none is repeated."""
    answer = refusal_of("--api-key-file", key_file(tmp_path, text))
    assert "--api-key-file" in answer
    assert not any(word in answer for word in ("sk-good", "short", "geheim"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("1k", 1000), ("1KB", 1000), ("1KiB", 1024), ("0.5 GiB", 2**29), ("2T", 2 * 10**12), ("5b", 5), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert settings_of("--memory", text).memory == size


def test_bytes_for_people() -> None:
    assert [format_bytes(size) for size in (0, 1023, 98_362_432, 5 * 2**40)] == ["0 B", "1023 B", "93.8 MiB", "5.0 TiB"]
