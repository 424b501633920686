"""POST /v1/images/generations, /edits and /variations: pictures from words, from pictures and words, and from pictures alone.

The road of a request through the server; its bounds stand in `images_schema`, its form in `images_shape`, the drawing in `easel`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.body import BodyLimits, checked, parse
from service.api.brief import Brief, kept_at_random, kept_outside, make_order
from service.api.easel import Easel, Errand, Order, Painting, Preview
from service.api.form import FormLimits, Source, form_file, form_texts, is_form, parse_either, read_form
from service.api.images_schema import MAX_INPUTS, EditRequest, ImageRequest, PictureFields
from service.api.images_shape import ImagesShape, Result
from service.api.improve import caption_score, num_redrawn, refined
from service.api.routes import caller_of, json_answer, warnings_header
from service.api.sse import ByteStream, while_connected
from service.api.strict import Warnings
from service.api.studio import Studio
from service.api.together import together
from service.errors import RequestError

_FORM_FILES = ("image", "image[]", "mask")
_MAX_FORM_FIELDS = 64
_MAX_FIELD_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Job:
    """One request's work. base_url: of the server, as the client called it."""

    model: str
    order: Order
    wanted: PictureFields
    caption: str
    warnings: Warnings
    is_edit: bool
    base_url: str


class ImageAnswers:
    """Draws what jobs ask for, and answers them whole or as events."""

    def __init__(self, studio: Studio) -> None:
        self.easel = studio.easel
        self.media = studio.media
        self.gallery = studio.gallery

    async def answer(self, request: Request, job: Job) -> Response:
        native, marks = self.easel.backend.info(job.model).picture_size, self.easel.marks(job.model)
        num_seen = sum(map(marks.is_code, job.order.prompt))
        shape = ImagesShape(job.wanted, native, int(time.time()), self.media, is_edit=job.is_edit, num_seen=num_seen)
        if shape.size != native:
            height, width = native
            text = f"the model draws {width}x{height}; the picture was resampled to {shape.size[1]}x{shape.size[0]}"
            job.warnings.note("size", text)
        if job.wanted.stream:
            return ByteStream(self._events(job, shape), warnings_header(job.warnings))
        results = await while_connected(request, self._results(job))
        url_of = None if job.wanted.response_format == "b64_json" else lambda data, kind: job.base_url + self.gallery.keep(data, kind)
        return json_answer(await shape.whole(results, url_of), job.warnings)

    async def _results(self, job: Job) -> list[Result]:
        """The best n of what was drawn."""
        paintings = await self.easel.paintings(job.order)
        results = await together(self._finished(job, painting) for painting in paintings)
        return await self._best(job, results) if len(results) > job.wanted.n else results

    async def _finished(self, job: Job, painting: Painting) -> Result:
        """Refined where that was asked for, and drawn."""
        (codes,), seed = painting.frames, job.order.sampling.seed + painting.choice
        num_open = sum(1 for code in job.order.rule.kept if code < 0) if job.order.rule.kept else len(codes)
        num_drawn, scores = num_open + job.wanted.refine * num_redrawn(num_open), None
        if job.wanted.refine:
            codes, scores = await refined(self.easel, job.order, codes, seed, job.wanted.refine)
        pixels = await self.easel.draw(job.model, codes, job.order.errand)
        self.easel.backend.count_picture(job.model, job.order.errand.arrival)
        return Result(painting.choice, seed, codes, pixels, painting.usage, num_drawn, scores)

    async def _best(self, job: Job, results: Sequence[Result]) -> list[Result]:
        codec = self.easel.backend.codecs[job.model]
        scores = await together(caption_score(self.easel, codec, job.order, result.codes, job.caption) for result in results)
        ranked = sorted(zip(scores, results, strict=True), key=lambda pair: -pair[0])[: job.wanted.n]
        # What was drawn and thrown away was drawn as well.
        others = sum(result.num_drawn for result in results) - sum(result.num_drawn for _, result in ranked)
        best = [replace(result, caption_score=score) for score, result in ranked]
        return [replace(best[0], num_drawn=best[0].num_drawn + others), *best[1:]]

    async def _events(self, job: Job, shape: ImagesShape) -> AsyncGenerator[bytes, None]:
        """Previews as they come, and each picture as soon as it is done."""
        finishing: set[asyncio.Task[Result]] = set()
        async with aclosing(self.easel.paint(job.order)) as items:
            item: asyncio.Task[Any] | None = asyncio.ensure_future(anext(items, None))
            try:
                while item is not None or finishing:
                    waiting = {*finishing, item} if item is not None else set(finishing)
                    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if item is not None and item in done:
                        found = item.result()
                        if isinstance(found, Preview):
                            yield await shape.preview(found)
                        elif isinstance(found, Painting):
                            finishing.add(asyncio.create_task(self._finished(job, found)))
                        item = asyncio.ensure_future(anext(items, None)) if found is not None else None
                    for task in finishing & done:
                        finishing.discard(task)
                        yield await shape.completed(task.result())
            finally:
                left = [task for task in (item, *finishing) if task is not None]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)


def images_router(studio: Studio, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)
    easel, answers = studio.easel, ImageAnswers(studio)

    @router.post("/v1/images/generations")
    async def create_image(request: Request) -> Response:
        wanted, warnings = await parse(request, ImageRequest, limits)
        model = easel.choose(wanted.model)
        return await answers.answer(request, _job(request, easel, model, Brief(wanted.prompt), wanted, warnings))

    @router.post("/v1/images/edits")
    async def edit_image(request: Request) -> Response:
        return await _edit(request, await _read_edit(request, limits))

    @router.post("/v1/images/variations")
    async def vary_image(request: Request) -> Response:
        edit = await _read_edit(request, limits)
        for name, value in (("prompt", edit.wanted.prompt), ("mask", edit.mask)):
            if value:
                raise RequestError(f"a variation has no {name}; /v1/images/edits takes one", param=name)
        return await _edit(request, edit)

    async def _edit(request: Request, edit: Edit) -> Response:
        model = easel.choose(edit.wanted.model)
        brief = await _edit_brief(studio, model, edit, Errand.of(caller_of(request), edit.wanted))
        return await answers.answer(request, _job(request, easel, model, brief, edit.wanted, edit.warnings))

    return router


def _job(request: Request, easel: Easel, model: str, brief: Brief, wanted: PictureFields, warnings: Warnings) -> Job:
    """Mutates: warnings. Raises: RequestError."""
    if wanted.num_drawn > wanted.n and not brief.text:
        raise RequestError("best_of needs a prompt, by which the best are known", param="best_of")
    if wanted.num_drawn > wanted.n and wanted.stream:
        raise RequestError("best_of greater than n is only allowed when stream is false: the best are known at the end", param="best_of")
    for name in ("quality", "style"):
        if getattr(wanted, name) not in (None, "auto", "standard"):
            warnings.note(name, f"{name} has no effect on this model")
    order = make_order(easel, model, brief, wanted, caller_of(request), warnings, num_choices=wanted.num_drawn)
    rows, count = easel.marks(model).rows, wanted.partial_images
    if wanted.output_format == "png" and "output_compression" in wanted.model_fields_set:
        warnings.note("output_compression", "output_compression has no effect on png, which loses nothing")
    order = replace(order, preview_rows=tuple(sorted({max(1, rows * (index + 1) // (count + 1)) for index in range(count)})))
    return Job(model, order, wanted, brief.text, warnings, isinstance(wanted, EditRequest), str(request.base_url).rstrip("/"))


@dataclass(frozen=True, slots=True)
class Edit:
    """What is to be edited. pictures, mask: files or URLs, each with the field that it came in."""

    wanted: EditRequest
    warnings: Warnings
    pictures: Sequence[Source]
    mask: Source | None


async def _edit_brief(studio: Studio, model: str, edit: Edit, errand: Errand) -> Brief:
    """Mutates: the warnings. Raises: RequestError naming the picture."""
    wanted, marks = edit.wanted, studio.easel.marks(model)
    if not edit.pictures:
        raise RequestError("a picture is required: image in a form, images in JSON", param="image", code="missing_required_parameter")
    if len(edit.pictures) > 1:
        raise RequestError("the model edits one picture at a time", param=edit.pictures[1][0])
    is_variation = edit.mask is None and not wanted.prompt
    if not is_variation and "strength" in wanted.model_fields_set:
        edit.warnings.note("strength", "strength has no effect with a prompt or a mask")
    param, source = edit.pictures[0]
    codes = await studio.see(model, source, param, errand)
    if edit.mask is not None:
        param, source = edit.mask
        return Brief(wanted.prompt, kept=kept_outside(codes, marks, await studio.media.mask(source, param)))
    if is_variation:
        return Brief("", kept=kept_at_random(codes, wanted.strength))
    return Brief(wanted.prompt, pictures=(codes,))


async def _read_edit(request: Request, limits: BodyLimits) -> Edit:
    """Of JSON or of a form. Raises: RequestError and its kinds."""
    if not is_form(request):
        wanted, warnings = await parse_either(request, EditRequest, limits)
        pictures: list[Source] = [each.at(f"images[{index}]") for index, each in enumerate(wanted.images)]
        return Edit(wanted, warnings, pictures, wanted.mask.at("mask") if wanted.mask is not None else None)
    form_limits = FormLimits(limits.max_bytes, MAX_INPUTS + 1, _MAX_FORM_FIELDS, _MAX_FIELD_BYTES, limits.idle_s, "image", limits.origins)
    async with read_form(request, form_limits) as form:
        wanted, warnings = checked(form_texts(form, _FORM_FILES), EditRequest, limits.is_strict, is_form=True)
        with limits.room.share() as share:
            pictures = [await form_file(value, name, share) for name, value in form.multi_items() if name in _FORM_FILES[:2]]
            masks = [await form_file(value, "mask", share) for value in form.getlist("mask")]
    if len(masks) > 1:
        raise RequestError("mask was given twice", param="mask")
    return Edit(wanted, warnings, pictures, masks[0] if masks else None)
