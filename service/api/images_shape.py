"""The JSON of the picture routes, whole and as events, in OpenAI's form; with the seed of each picture, so that it can be drawn again.

Files are made in other threads. No engine. Called by `images`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.api.easel import Codes, Preview
from service.api.images_schema import PictureFields
from service.api.media import Media
from service.api.sse import event
from service.codec.pixels import MEDIA_TYPES, Pixels, encode_picture, fitted
from service.engine.messages import Usage


@dataclass(frozen=True, slots=True)
class Result:
    """One picture. num_drawn: codes that were drawn for it. scores: its log-likelihood before refining and after each round."""

    choice: int
    seed: int
    codes: Codes
    pixels: Pixels
    usage: Usage | None
    num_drawn: int
    scores: list[float] | None = None
    caption_score: float | None = None


class ImagesShape:
    """native, size: height and width that the model draws, and that are wanted. num_seen: codes in the prompt."""

    def __init__(self, wanted: PictureFields, native: tuple[int, int], created: int, media: Media, *, is_edit: bool, num_seen: int) -> None:
        self.size = wanted.size_of(native)
        self._wanted = wanted
        self._created = created
        self._media = media
        self._num_seen = num_seen
        self._name = "image_edit" if is_edit else "image_generation"
        self._about = {
            "background": "opaque",
            "output_format": wanted.output_format,
            "quality": "auto",
            "size": f"{self.size[1]}x{self.size[0]}",
        }

    async def file(self, pixels: Pixels) -> bytes:
        """In the size and format that are wanted."""
        wanted, (height, width) = self._wanted, self.size

        def work() -> bytes:
            return encode_picture(fitted(pixels, height, width), wanted.output_format, wanted.output_compression)

        return await self._media.apart(work, "size")

    async def whole(self, results: Sequence[Result], url_of: Callable[[bytes, str], str] | None) -> dict[str, Any]:
        """url_of: keeps a file and gives its URL; None for files in the answer itself."""
        data = []
        for result in results:
            file = await self.file(result.pixels)
            kind = MEDIA_TYPES[self._wanted.output_format]
            place = {"url": url_of(file, kind)} if url_of is not None else {"b64_json": _text(file)}
            data.append({**place, **_remarks(result)})
        about = {name: value for name, value in self._about.items() if name != "quality"}  # whose "auto" whole answers have no word for
        return {"created": self._created, "data": data, **about, "usage": self._usage(results)}

    async def preview(self, preview: Preview) -> bytes:
        body = {"b64_json": _text(await self.file(preview.pixels)), "partial_image_index": preview.index, "index": preview.choice}
        return self._event("partial_image", body)

    async def completed(self, result: Result) -> bytes:
        body = {"b64_json": _text(await self.file(result.pixels)), "index": result.choice, **_remarks(result)}
        return self._event("completed", {**body, "usage": self._usage([result])})

    def _event(self, what: str, body: dict[str, Any]) -> bytes:
        name = f"{self._name}.{what}"
        return event({"type": name, "created_at": self._created, **self._about, **body}, name)

    def _usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """A prompt counts once; of a guided picture the conditional one."""
        prompt = next((result.usage.prompt_tokens for result in results if result.usage is not None), 0)
        seen = min(self._num_seen, prompt)  # where nothing was told of the prompt, none
        drawn = sum(result.num_drawn for result in results)
        return {
            "input_tokens": prompt,
            "output_tokens": drawn,
            "total_tokens": prompt + drawn,
            "input_tokens_details": {"text_tokens": prompt - seen, "image_tokens": seen},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        }


def _remarks(result: Result) -> dict[str, Any]:
    remarks: dict[str, Any] = {"seed": result.seed}
    if result.scores is not None:
        remarks["refine_scores"] = result.scores
    if result.caption_score is not None:
        remarks["caption_score"] = result.caption_score
    return remarks


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode("ascii")
