"""What tests of pictures share: one server's clients, prompts that braid-nano knows, files and pixels, and its image tokenizer.

No tests. Used by `test_pictures`, which says what is promised.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from numpy.typing import NDArray
from PIL import Image

NAME = "braid-nano"
SIDE, PLACES, CELL = 32, 64, 4
WILD: dict[str, Any] = {"temperature": 2.0, "min_p": 0.0}
"""A sampling under which this model, which has learnt its pictures by heart, draws another one with every seed: without it a test of seeds
could not fail."""
TURTLE = "turtle, twemoji style"
PIZZA = "pizza, noto style"
STAR = "Draw a big red star in row 1, column 2, on sand."
PROMPTS = (TURTLE, STAR, "cat face, noto style", "Draw a small blue circle in row 1, column 1, on sky.")
WHAT, DESCRIBE = "What is this?", "Describe the picture."
DRAW, EDIT, VARY = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
CHAT, FILM = "/v1/chat/completions", "/v1/videos"
LOWER_HALF = (0, SIDE // 2, SIDE, SIDE)


@dataclass(frozen=True)
class Stand:
    """The server: by the SDK and by plain HTTP, both with its key."""

    url: str
    sdk: openai.OpenAI
    http: httpx.Client

    def draw(self, prompt: str, seed: int, **more: Any) -> bytes:
        return self.draw_all(prompt, seed, **more)[0]

    def draw_all(self, prompt: str, seed: int, **more: Any) -> list[bytes]:
        return files(self.sdk.images.generate(model=NAME, prompt=prompt, n=more.pop("n", 1), extra_body={"seed": seed, **more}))

    def edit(self, picture: bytes, prompt: str, seed: int, mask: bytes | None = None, **more: Any) -> bytes:
        mask_file = openai.omit if mask is None else ("mask.png", mask, "image/png")
        answer = self.sdk.images.edit(
            model=NAME, image=("a.png", picture, "image/png"), mask=mask_file, prompt=prompt, extra_body={"seed": seed, **more}
        )
        return files(answer)[0]

    def vary(self, picture: bytes, seed: int, **more: Any) -> list[bytes]:
        n = more.pop("n", 1)
        return files(self.sdk.images.create_variation(model=NAME, image=("a.png", picture), n=n, extra_body={"seed": seed, **more}))

    def ask(self, messages: list[Any], **more: Any) -> Any:
        return self.sdk.chat.completions.create(model=NAME, messages=messages, max_tokens=128, **more)

    def words(self, picture: bytes, question: str) -> str:
        return str(self.ask([user(question, picture)], temperature=0).choices[0].message.content)

    def codes(self, picture: bytes) -> list[int]:
        """As the server reads it: the ids of its prompt tell them."""
        body = {"model": NAME, "messages": [user(WHAT, picture)], "max_tokens": 1, "return_token_ids": True}
        return codes_among(self.http.post(CHAT, json=body).raise_for_status().json()["prompt_token_ids"])

    def number(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"braid:{name}"))

    @property
    def kv_usage(self) -> float:
        return self.number("kv_cache_usage_perc")

    @property
    def num_aborted(self) -> float:
        return self.number('request_success_total{engine="0",finished_reason="abort"')

    def is_idle(self) -> bool:
        return not self.number("num_requests_running") and not self.number("num_requests_waiting")


def eventually(check: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.02)


def files(answer: Any) -> list[bytes]:
    return [base64.b64decode(each.b64_json) for each in answer.data]


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def array(file: bytes) -> NDArray[np.int64]:
    return np.asarray(opened(file).convert("RGB")).astype(np.int64)


def png(image: Image.Image | NDArray[Any]) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image.astype(np.uint8))).save(file, "PNG")
    return file.getvalue()


def mask(*clear: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGBA") -> bytes:
    """Transparent in these boxes: left, top, right, bottom."""
    image = Image.new(mode, size, (0, 0, 0, 255)[: len(mode)])
    for box in clear:
        image.paste((0, 0, 0, 0), box)
    return png(image)


def data_url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    return {"role": "user", "content": [*(image_part(data_url(each)) for each in pictures), {"type": "text", "text": text}]}


def file_of(part: Any) -> bytes:
    """Of an image part in an answer."""
    head, _, text = part["image_url"]["url"].partition(",")
    assert (part["type"], head) == ("image_url", "data:image/png;base64")
    return base64.b64decode(text)


def codes_among(ids: Sequence[int]) -> list[int]:
    return [each - 2048 for each in ids if each >= 2048]


def check_refused(answer: httpx.Response, param: str | None, code: str | None = None, status: int = 400) -> str:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    if code is not None:
        assert error["code"] == code, error
    return str(error["message"])


def fields(picture: Image.Image, box: tuple[float, float, float, float] | None = None) -> NDArray[np.int64]:
    return np.asarray(picture.resize((8, 8), Image.Resampling.BOX, box)).astype(np.int64)


def near(decoded: NDArray[np.int64], picture: bytes) -> NDArray[np.int64]:
    """The greatest difference of each decoded picture."""
    return np.asarray(abs(decoded - array(picture)).max(axis=(1, 2, 3)))


class Decoder:
    """The model's own image tokenizer, to tell a picture's codes exactly."""

    def __init__(self) -> None:
        import torch

        from service.model.vq_files import read_image_tokenizer

        self._torch = torch
        self._model = read_image_tokenizer(Path(__file__).parents[2] / "weights" / NAME / "image_tokenizer").eval()

    def pictures(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        """codes [N, 64] to pixels [N, Y, X, 3]."""
        with self._torch.inference_mode():
            pixels = self._model.decode(self._torch.tensor(codes).view(-1, 8, 8))
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
        return np.asarray(levels.numpy().astype(np.int64))

    def likely(self, picture: bytes, place: int, count: int) -> list[int]:
        """The codes nearest to what stands in one place of a picture."""
        torch = self._torch
        with torch.inference_mode():
            pixels = torch.tensor(array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
            latent = self._model.latents(pixels).view(PLACES, -1)[place]
            return (self._model.codebook @ latent).topk(count).indices.tolist()
