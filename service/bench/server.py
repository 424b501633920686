"""The server that is measured: where it is, and the few requests that are not measured. Those that are go through `request`."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from typing import Any

import httpx

from service.errors import StartupError

_TIMEOUT = httpx.Timeout(10, read=600)


class RefusedError(StartupError):
    """The server answered, with an error. `answer` is its text."""

    def __init__(self, status: int, answer: str) -> None:
        super().__init__(f"the server answers {status}: {reason_in(answer)}")
        self.answer = answer


def reason_in(answer: str) -> str:
    """What a body says that tells of an error, in OpenAI's form, FastAPI's or any other."""
    try:
        found = json.loads(answer)
        found = found.get("error") or found.get("detail") or found
        answer = str(found.get("message") or found) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        pass
    return answer.strip()[:300]


class Server:
    """Any server that speaks OpenAI's protocol. base_url as in vLLM, without /v1; with it is understood too."""

    def __init__(self, base_url: str, api_key: str = "") -> None:
        try:
            self.url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
        except (httpx.InvalidURL, TypeError) as error:
            raise StartupError(f"--base-url {base_url!r} is not a URL") from error
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise StartupError(f"--base-url {base_url!r} should look like http://127.0.0.1:8000")
        if not re.fullmatch(r"[\x21-\x7e]*", api_key):
            raise StartupError("--api-key must be of visible ASCII characters")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls = ssl.create_default_context() if self.url.scheme == "https" else None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self.url.port or (443 if self._tls else 80)
        return await asyncio.open_connection(self.url.host, port, ssl=self._tls)

    def head(self, route: str, length: int) -> bytes:
        """Request line and headers of a POST whose connection ends with its answer."""
        lines = [f"POST {self.url.path.rstrip('/')}{route} HTTP/1.1", f"Host: {self.url.netloc.decode()}", "Content-Type: application/json"]
        lines += [*(f"{name}: {value}" for name, value in self._headers.items()), f"Content-Length: {length}", "Connection: close"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def first_model(self) -> str:
        """Raises: StartupError when no server answers, or one without models."""
        found = await self._call("GET", "/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise StartupError(f"the server at {self.url} lists no models; give --model") from error

    async def prompt_tokens(self, route: str, body: dict[str, Any]) -> int:
        """The server's own count of a prompt; 0 if it tells none. Raises: StartupError; RefusedError when it answers with an error."""
        found = await self._call("POST", route, body)
        try:
            return int(found["usage"]["prompt_tokens"])
        except (LookupError, TypeError, ValueError):
            return 0

    async def _call(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        # Proxies of the environment are not asked: the measured requests don't go through one either.
        verify = self._tls if self._tls is not None else False
        try:
            async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT, trust_env=False, verify=verify) as http:
                answer = await http.request(method, f"{str(self.url).rstrip('/')}{route}", json=body)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise StartupError(f"no server answers at {self.url} ({reason}); start one with: braid serve") from error
        if answer.status_code != 200:
            raise RefusedError(answer.status_code, answer.text)
        try:
            return answer.json()
        except ValueError as error:
            raise StartupError(f"what answers at {self.url} is not a server of this kind; check --base-url") from error
