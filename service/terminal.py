"""A chat in the terminal against a running server, over the same HTTP interface that everyone has. No engine, no model, no torch.

Called by `cli` alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import click
import httpx

from service.errors import StartupError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline: an answer must not steer the terminal
_COMMANDS = "/reset forgets the conversation, /system TEXT starts a new one under a system message, /quit ends"


class ChatClient:
    """Streams answers of one model of one server. model "": the server's first."""

    def __init__(self, base_url: str, model: str, api_key: str, sampling: dict[str, float]) -> None:
        if not re.fullmatch(r"[\x21-\x7e]*", api_key):
            raise StartupError("--api-key must be of visible ASCII characters")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A long prompt may take minutes to its first token, so reading has no limit: Ctrl-C is there.
        try:
            self.http = httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(10, read=None))
        except (httpx.InvalidURL, ValueError) as error:
            raise StartupError(f"--base-url {base_url!r} is not a URL") from error
        self.sampling = sampling
        self.model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.http.close()

    def choose_model(self) -> str:
        """The model that will answer. Mutates: self.model, when it was left open. Raises: StartupError when no server answers."""
        try:
            response = self.http.get("models")
            _check(response)
            names = [str(each["id"]) for each in response.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StartupError(f"no server answers at {self.http.base_url} ({error}); start one with: braid serve") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StartupError(f"what answers at {self.http.base_url} is not a server of this kind; check --base-url") from error
        if not names or (self.model and self.model not in names):
            raise StartupError(f"the server has no model {self.model!r}; it has {', '.join(names) or 'none'}")
        self.model = self.model or names[0]
        return self.model

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer piece by piece. Closing the iterator stops the server's work. Raises: StartupError with the server's message."""
        body = {"model": self.model, "messages": messages, "stream": True, **self.sampling}
        try:
            with self.http.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    _check(response)
                yield from _contents(_events(response.iter_bytes()))
        except httpx.HTTPError as error:
            raise StartupError(f"the connection to the server broke: {error}") from error


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"HTTP status {response.status_code}"
    raise StartupError(f"the server refuses: {message}")


def _events(pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Parsed data lines up to [DONE]. Splits at line feeds only: JSON text may hold the other separators that Unicode knows.

    Raises: StartupError when the stream ends before its end, or is no JSON.
    """
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise StartupError("the server sent something that is not JSON") from error
            if isinstance(event, dict):
                yield event
    raise StartupError("the server ended the answer before it was whole")


def _contents(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        if "error" in event:
            error = event["error"]
            raise StartupError(f"the server gave up: {error.get('message') if isinstance(error, dict) else error}")
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield text


def talk(client: ChatClient, system: str) -> None:
    """Reads lines and prints answers until /quit or the end of input. Raises: StartupError when no server answers."""
    click.echo(f"{client.choose_model()} - {_COMMANDS}")
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # merely imported, it gives `input` editing and history
    messages = _beginning(system)
    while True:
        try:
            # Bytes that are no UTF-8 come out of a pipe as half surrogate pairs, which can't be sent.
            line = input("> ").strip().encode("utf-8", "replace").decode("utf-8")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            system = rest.strip() if command == "/system" else system
            messages = _beginning(system)
            click.echo("(a new conversation)")
        elif command.startswith("/"):
            click.echo(_COMMANDS)
        elif line:
            _take_turn(client, messages, line)


def _beginning(system: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _take_turn(client: ChatClient, messages: list[dict[str, str]], line: str) -> None:
    """Mutates: messages, by the question and what was answered of it; by nothing when the server refused."""
    said: list[str] = []
    question = {"role": "user", "content": line}
    pieces = client.answer([*messages, question])
    try:
        for piece in pieces:
            said.append(piece)
            click.echo(_CONTROL.sub("", piece), nl=False)
        click.echo()
    except KeyboardInterrupt:
        click.echo(" (stopped)")
    except StartupError as error:
        click.echo(f"\n({error.message})")
    finally:
        pieces.close()  # type: ignore[attr-defined]  # it is a generator
    if said:
        messages += [question, {"role": "assistant", "content": "".join(said)}]
