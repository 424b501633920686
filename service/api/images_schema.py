"""What the picture routes take: OpenAI's fields, and those that say how a picture is drawn, with every bound.

No HTTP, no engine. A form's fields are texts, and are read into the same schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator

from service.api.schema import MAX_CHARS, MinP, Priority, Seed, Strict, Temperature, Timeout, TopK, TopP, Word, equals
from service.engine.messages import MAX_DRAFT_LEN, MAX_GUIDANCE
from service.errors import RequestError

MAX_PICTURES = 10
MAX_BEST_OF = 32
MAX_ROUNDS = 8
MAX_SIDE = 2048
MAX_INPUTS = 16

Prompt = Annotated[str, StringConstraints(max_length=32_000)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Url = Annotated[str, StringConstraints(max_length=MAX_CHARS)]


class DrawFields(Strict):
    """How pictures are drawn and how large they are: absent numbers come from the model's own defaults."""

    model: Word | None = None
    seed: Seed | None = None
    guidance_scale: Guidance | None = None
    negative_prompt: Prompt | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    jacobi: Annotated[int, Field(ge=0, le=MAX_DRAFT_LEN)] | None = None
    user: Word | None = None
    priority: Priority = 0
    timeout: Timeout | None = None
    cache_salt: Word | None = None
    size: Annotated[str, StringConstraints(max_length=32)] = "auto"

    @field_validator("size", mode="after")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if value != "auto" and re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", value) is None:
            raise ValueError("must be auto, or width x height such as 256x256")
        return value

    def size_of(self, native: tuple[int, int]) -> tuple[int, int]:
        """Height and width that are wanted. native: what the model draws. Raises: RequestError."""
        if self.size == "auto":
            return native
        width, height = map(int, self.size.split("x"))
        if width > MAX_SIDE or height > MAX_SIDE or height < native[0] or width < native[1]:
            raise RequestError(
                f"size must be auto, or from {native[1]}x{native[0]}, which the model draws, to {MAX_SIDE}x{MAX_SIDE}", param="size"
            )
        return height, width


class PictureFields(DrawFields):
    """Of generations and edits alike."""

    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    refine: Annotated[int, Field(ge=0, le=MAX_ROUNDS)] = 0
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    # Taken, of no effect on a picture here.
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None
    safety_identifier: Word | None = None
    background: Literal["auto", "transparent", "opaque"] | None = None

    def check(self) -> None:
        if self.background == "transparent":
            raise RequestError(
                "background must be auto or opaque: the model draws no transparency", param="background", code="unsupported_parameter"
            )
        if self.partial_images and not self.stream:
            raise RequestError("partial_images is only allowed when stream is true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise RequestError("response_format must be b64_json when stream is true", param="response_format")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError("best_of must be at least n", param="best_of")
        if self.seed is not None and self.seed + MAX_BEST_OF > 2**63:
            raise RequestError(f"seed must be at most {2**63 - MAX_BEST_OF}", param="seed")

    @property
    def num_drawn(self) -> int:
        return self.best_of or self.n


class ImageRequest(PictureFields):
    prompt: Prompt


class ImageSource(Strict):
    """A picture in JSON."""

    image_url: Url | None = None
    file_id: Word | None = None

    def at(self, param: str) -> tuple[str, str]:
        """The field of its URL and the URL. Raises: RequestError."""
        if self.file_id is not None:
            text = f"{param}.file_id is not supported: send the picture as image_url"
            raise RequestError(text, param=f"{param}.file_id", code="unsupported_parameter")
        if self.image_url is None:
            raise RequestError(f"{param}.image_url is required", param=f"{param}.image_url", code="missing_required_parameter")
        return f"{param}.image_url", self.image_url


class EditRequest(PictureFields):
    """images: of JSON; a form brings files instead. strength: without words or mask, the share of the picture that is redrawn."""

    unbuilt: ClassVar[Mapping[str, Callable[[Any], bool]]] = {"input_fidelity": equals("low")}

    prompt: Prompt = ""
    images: Annotated[list[ImageSource], Field(max_length=MAX_INPUTS, fail_fast=True, default_factory=list)]
    mask: ImageSource | None = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5


class VideoRequest(DrawFields):
    """seconds: that the film takes to play; num_frames: pictures in it."""

    prompt: Prompt
    seconds: Literal["1", "2", "4", "8", "12", 1, 2, 4, 8, 12] = "4"
    num_frames: Annotated[int, Field(ge=1, le=64)] = 4
    input_reference: ImageSource | None = None
    output_format: Literal["mp4", "webp", "gif"] | None = None
