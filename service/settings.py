"""What a person can set for a server: one frozen `Settings`, and the click options that read it from flags, environment and a file.

Each knob stands once here, with its bounds, its default and its help, which makes it long. No file of the model is opened and nothing is
started. Called by `cli`; the composition root takes numbers out of `Settings` and hands them on as keywords.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import click

ENVIRONMENT_PREFIX = "BRAID"
DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_MODELS = (DEFAULT_MODEL, "braid-nano")
"""Text first: a request that names no model and wants words gets the better writer; one that wants pictures, the one that draws."""
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `braid serve` was told. 0 leaves a number to the engine (memory, max_context, threads) or turns it off (stall_exit_s).

    memory in bytes, for the weights and K/V of all models. max_queue_requests and max_queue_tokens bound what is in flight or waiting.
    data_dir: of files and batches; "off" for neither, "" for the user's own.
    draft_model: what guesses ids for the first of the models; "" for none.
    max_image_*: of each picture that a request brings. media_hosts: from which pictures may be fetched.
    api_keys: also those of api_key_file. allowed_hosts: of the Host header; none leaves the choice to `hosts_to_accept`.
    """

    models: tuple[str, ...] = DEFAULT_MODELS
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4", "fp8"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    device: str = "auto"
    memory: int = 0
    max_context: int = 0
    max_batch_tokens: int = 512
    max_prefill_ms: int = 30
    max_sequences: int = 64
    prefix_cache: bool = True
    deterministic: bool = False
    draft_model: str = ""
    tensor_parallel: int = 1
    async_scheduling: Literal["auto", "on", "off"] = "auto"
    threads: int = 0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str = ""
    allowed_hosts: tuple[str, ...] = ()
    strict: bool = False
    metrics_prefix: Literal["braid", "vllm"] = "braid"
    drain_timeout_s: float = 30.0
    stall_exit_s: float = 0.0
    max_queue_requests: int = 256
    max_queue_tokens: int = 1_000_000
    max_body_bytes: int = 32 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 36_000_000
    media_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    data_dir: str = ""
    max_file_bytes: int = 200 * 2**20
    max_data_bytes: int = 4 * 2**30
    batch_requests: int = 8
    max_prepared_bytes: int = 8 * 2**30
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def data_folder(self) -> Path | None:
        """Where files and batches are kept; None for nowhere. Unless told otherwise braid in the user's data folder (XDG_DATA_HOME, else
        ~/.local/share)."""
        if self.data_dir == "off":
            return None
        if self.data_dir:
            return Path(self.data_dir)
        home = os.environ.get("XDG_DATA_HOME")
        try:
            return (Path(home) if home else Path("~/.local/share").expanduser()) / "braid"
        except RuntimeError:  # a user without a home
            return None


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.5
    """A number of bytes: 4GiB, 800MB, 0.5G, or plain 1048576."""

    name = "size"

    def __init__(self, low: int, high: int = 2**50) -> None:
        self.low = low
        self.high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        unit = _UNITS.get(match[2]) if match else None
        if match is None or unit is None:
            self.fail(f"{value!r} is not a size; write a number of bytes or something like 4GiB or 800MB", param, ctx)
        size = int(float(match[1]) * unit)
        if not self.low <= size <= self.high:
            self.fail(f"{value} is out of range; at least {format_bytes(self.low)} and at most {format_bytes(self.high)}", param, ctx)
        return size


class Seconds(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.5
    """A finite number of seconds, 0 ... one day."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds <= 86_400:  # also false for NaN
            self.fail(f"{value!r} is not a number of seconds between 0 and 86400", param, ctx)
        return seconds


class Text(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.5
    """A word of visible ASCII. In the environment, several are separated by commas or spaces."""

    def __init__(self, name: str, pattern: str, what: str) -> None:
        self.name = name
        self.pattern = re.compile(pattern)
        self.what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or not self.pattern.fullmatch(value):
            self.fail(f"not {self.what}", param, ctx)  # the value itself may be a secret
        return value

    def split_envvar_value(self, rv: str) -> list[str]:
        return re.split(r"[\s,]+", rv.strip(" ,\t\n"))


class Device(click.ParamType):  # type: ignore[type-arg]  # generic only in click 8.5
    """auto, cpu, cuda or cuda:N."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", value):
            self.fail(f"{value!r} is not a device; there are auto, cpu, cuda and cuda:N", param, ctx)
        return value


def format_bytes(size: float) -> str:
    """For people, in binary units: 98362432 is 93.8 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _number(low: int, high: int) -> click.IntRange:
    return click.IntRange(low, high)


def _option(*flags: str, type: Any = None, help: str, **more: Any) -> Callable[[Any], Any]:
    """A click option whose default is that of the `Settings` field it fills (the last of `flags` without dashes)."""
    name = next(flag for flag in flags if not flag.startswith("-"))
    default = next(each.default for each in fields(Settings) if each.name == name)
    shown: Any = more.pop("show_default", True)
    return click.option(*flags, type=type, help=help, default=default, show_default=shown, show_envvar=True, **more)


def _read_config_file(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Lays the file's values under flags and environment. Raises: click.BadParameter for an unreadable file or a bad key."""
    if not path:
        return
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.BadParameter(f"{path} can't be read: {reason}", ctx, param) from None
    options = {each.name: each for each in ctx.command.params if each.name in {known.name for known in fields(Settings)}}
    for key, value in values.items():
        if key not in options:
            near = difflib.get_close_matches(key, [str(name) for name in options], 1)
            hint = f"; do you mean {near[0]}?" if near else f"; there are {', '.join(sorted(str(name) for name in options))}"
            raise click.BadParameter(f"{path} sets {key}, which is not a setting{hint}", ctx, param)
        problem = _type_problem(options[key], value)
        if problem:
            raise click.BadParameter(f"{path} sets {key} to {problem}", ctx, param)
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _type_problem(option: click.Parameter, value: object) -> str | None:
    """click would read true as 1 and a list as text; a file that says so is mistaken."""
    is_flag = isinstance(option, click.Option) and option.is_flag
    is_list = option.multiple if isinstance(option, click.Option) else option.nargs == -1
    if is_flag != isinstance(value, bool):
        return "something other than true or false" if is_flag else "true or false, which it can't be"
    if is_list != isinstance(value, list):
        return "a single value; it takes a list" if is_list else "a list; it takes a single value"
    parts = value if isinstance(value, list) else [value]
    if isinstance(option.type, click.IntRange) and any(isinstance(part, float) for part in parts):
        return "a fraction; it takes a whole number"
    if is_list and any(not isinstance(part, str) for part in parts):
        return "a list that holds something other than text"
    return None if all(isinstance(part, str | int | float) for part in parts) else "a table or a date"


_HOST = Text("host", r"[A-Za-z0-9.:_\-\[\]]{1,255}", "a host name or an address")
_NAME = Text("host", r"\*|[A-Za-z0-9.:_\-\[\]]{1,255}", "a host name or an address without a port, or *")
_KEY = Text("key", r"[\x21-\x7e]{8,512}", "a key of 8 to 512 visible ASCII characters")
_ORIGIN = Text("origin", r"\*|https?://[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?", "an origin such as https://example.org, or *")
_LOGS = click.Choice(["debug", "info", "warning", "error"])


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file. Warns on stderr where others than its owner can read it. Raises: click.UsageError; no message holds a key."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise click.UsageError(f"--api-key-file {path} can't be read: {reason}") from None
    if mode & 0o007:
        click.echo(f"warning: everybody on this machine can read the keys in {path}; chmod 600 or 640 would end that", err=True)
    # A # inside of a word may belong to a key.
    found = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]
    for number, key in enumerate(found, 1):
        if key and not _KEY.pattern.fullmatch(key):
            raise click.UsageError(f"line {number} of --api-key-file {path} is not {_KEY.what}")
    keys = tuple(filter(None, found))
    if not keys:
        raise click.UsageError(f"--api-key-file {path} holds no key, and without one everybody could call")
    return keys


_OPTIONS = (
    click.argument("models", metavar="[MODEL]...", nargs=-1, envvar=f"{ENVIRONMENT_PREFIX}_MODELS"),
    click.option(
        "--config",
        type=click.Path(dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=_read_config_file,
        show_envvar=True,
        help="A TOML file of settings, named as in the environment without the prefix and in lower case. Flags and environment win.",
    ),
    _option("--host", "host", type=_HOST, help="Address to listen on."),
    _option("--port", "port", type=_number(0, 65_535), help="Port to listen on; 0 takes a free one."),
    _option(
        "--dtype",
        "dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "int8", "int4", "fp8"]),
        help="Of the weights. auto is int8 on a CPU and bfloat16 on a GPU; fp8 is for GPUs alone.",
    ),
    _option(
        "--kv-dtype",
        "kv_dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "int8", "fp8"]),
        help="Of keys and values; fp8 on a GPU. auto is int8 beside quantised weights on a CPU, else as the weights or bfloat16.",
    ),
    _option("--device", "device", type=Device(), help="auto, cpu, cuda or cuda:N."),
    _option(
        "--memory", "memory", type=Size(0), show_default="half of what is free", help="For weights and K/V of all models, such as 4GiB."
    ),
    _option("--max-context", "max_context", type=_number(0, 2**31 - 1), show_default="the model's own", help="Longest sequence in tokens."),
    _option("--max-batch-tokens", "max_batch_tokens", type=_number(1, 2**17), help="Most tokens computed in one step."),
    _option(
        "--max-prefill-ms",
        "max_prefill_ms",
        type=_number(0, 3_600_000),
        help="Milliseconds that prompts may add to a step in which others get their next token; 0: no bound.",
    ),
    _option("--max-sequences", "max_sequences", type=_number(1, 4096), help="Most sequences that run at once, per model."),
    _option("--prefix-cache/--no-prefix-cache", "prefix_cache", help="Share the K/V of equal beginnings among requests."),
    _option(
        "--deterministic/--no-deterministic",
        "deterministic",
        help="On a GPU: no row of a step depends on the others, to the last bit; slower. On a CPU int8 and int4 are so anyway.",
    ),
    _option(
        "--draft-model",
        "draft_model",
        metavar="MODEL",
        show_default="none",
        help="A small model with the same tokens that guesses ahead for the first MODEL; answers stay the same.",
    ),
    _option(
        "--tensor-parallel",
        "tensor_parallel",
        type=_number(1, 64),
        help="Processes that share the matrices and the K/V of each model; on GPUs one each.",
    ),
    _option(
        "--async-scheduling",
        "async_scheduling",
        type=click.Choice(["auto", "on", "off"]),
        help="Begin a step before the ids of the one in front are known, so that a GPU never waits for the host. auto is on on a GPU.",
    ),
    _option("--threads", "threads", type=_number(0, 1024), show_default="one per core", help="CPU threads of the engine."),
    _option(
        "--api-key",
        "api_keys",
        type=_KEY,
        multiple=True,
        show_default="none: open to all",
        help="A key that clients must send; repeatable. Prefer the environment: others can read a command line.",
    ),
    _option(
        "--api-key-file",
        "api_key_file",
        type=click.Path(),
        show_default="none",
        help="A file of keys, one a line; what follows a # is a comment. They add to those given one by one.",
    ),
    _option(
        "--allowed-host",
        "allowed_hosts",
        type=_NAME,
        multiple=True,
        show_default="this machine's own names where only it can call and no key is asked for, else any",
        help="A name that requests may call the server by, without port; repeatable; * for any.",
    ),
    _option("--strict/--no-strict", "strict", help="Refuse what would else be a warning, such as an unknown field."),
    _option("--metrics-prefix", "metrics_prefix", type=click.Choice(["braid", "vllm"]), help="First word of the metrics' names."),
    _option("--drain-timeout", "drain_timeout_s", type=Seconds(), help="Seconds that running requests get to finish at shutdown."),
    _option(
        "--stall-exit", "stall_exit_s", type=Seconds(), show_default="0: never", help="Exit when one step has run for so many seconds."
    ),
    _option("--max-queue-requests", "max_queue_requests", type=_number(1, 10**6), help="Most requests in flight; more get 429."),
    _option("--max-queue-tokens", "max_queue_tokens", type=_number(1, 10**10), help="Most tokens in flight; more get 429."),
    _option("--max-body", "max_body_bytes", type=Size(1024, 2**30), show_default="32MiB", help="Largest request body."),
    _option("--max-image", "max_image_bytes", type=Size(1024, 2**30), show_default="20MiB", help="Largest file of a picture in a request."),
    _option("--max-image-pixels", "max_image_pixels", type=_number(1024, 10**9), help="Most pixels of a picture in a request."),
    _option(
        "--media-host",
        "media_hosts",
        type=_HOST,
        multiple=True,
        show_default="none",
        help="A host that pictures in requests may be fetched from; repeatable.",
    ),
    _option(
        "--allow-origin",
        "allow_origins",
        type=_ORIGIN,
        multiple=True,
        show_default="none",
        help="A web origin that browsers may call from; repeatable; * for any.",
    ),
    _option(
        "--data-dir",
        "data_dir",
        type=click.Path(file_okay=False),
        show_default="braid in the user's data folder",
        help="Where uploaded files and batches are kept; off for a server without them.",
    ),
    _option("--max-file", "max_file_bytes", type=Size(1024, 2**40), show_default="200MiB", help="Largest uploaded file."),
    _option("--max-data", "max_data_bytes", type=Size(1024, 2**50), show_default="4GiB", help="Most bytes of all files together."),
    _option("--batch-requests", "batch_requests", type=_number(1, 4096), help="Most requests of batches that run at once."),
    _option(
        "--max-prepared",
        "max_prepared_bytes",
        type=Size(0, 2**50),
        show_default="8GiB",
        help="Most bytes of prepared weights kept in the cache folder for faster starts; 0 for none.",
    ),
    _option("--log-level", "log_level", type=_LOGS, help="Least severity that is logged."),
)


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds every setting to a click command; it is called with one keyword per field of `Settings`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_settings(values: dict[str, Any]) -> Settings:
    """From what click has read and checked. Raises: click.UsageError where two settings do not fit each other."""
    if not values["models"]:
        values = {**values, "models": Settings().models}
    if values["api_key_file"]:
        values = {**values, "api_keys": (*values["api_keys"], *read_keys(Path(values["api_key_file"])))}
    settings = Settings(**values)
    if settings.max_context == 1:
        raise click.UsageError("--max-context must be 0 (the model's own) or at least 2: one token of prompt and one of answer")
    if settings.stall_exit_s and settings.stall_exit_s < 2:
        raise click.UsageError("--stall-exit must be 0 or at least 2 seconds: shorter steps are usual")
    if settings.threads > 4 * (os.cpu_count() or 1):
        raise click.UsageError(f"--threads {settings.threads} is more than four for each of this machine's {os.cpu_count()} cores")
    return settings
