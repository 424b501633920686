"""The routes under /v1/videos: films drawn frame by frame as jobs that are asked about until they are done.

Jobs and films are kept in memory, each tenant's its own: a restart forgets them, and the oldest make room for new ones. The frames come
from `easel`, as every other picture does.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.backend import Caller
from service.api.body import BodyLimits, checked
from service.api.brief import Brief, make_order
from service.api.easel import Codes, Easel, Errand, Frame, Order
from service.api.form import FormLimits, Source, form_file, form_texts, is_form, parse_either, read_form
from service.api.images_schema import VideoRequest
from service.api.listing import is_descending, page, page_limit
from service.api.routes import caller_of, json_answer
from service.api.strict import Warnings
from service.api.studio import Studio
from service.codec.film import FILM_TYPES, FilmKind, encode_film, film_kinds
from service.codec.pixels import Pixels, encode_picture, fitted
from service.errors import BraidError, ConflictError, ContextLengthError, EngineError, NotFoundError, OverloadedError, RequestError

log = logging.getLogger("braid.http")

LIFETIME_S = 3600
MAX_RUNNING = 64
MAX_KEPT = 512
MAX_BYTES = 128 * 2**20
MAX_PIXELS = 64 * 2**20  # of all frames of a film: three bytes each, twice while it is encoded
POLL_MS = "200"
_MAX_LIST = 100
_DRAWN_SHARE = 90  # of the progress when all codes are there; the rest is pixels and the file

Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclass(eq=False, slots=True)
class Job:
    """One film. kind: of its file. thumbnail: a PNG of its first frame."""

    id: str
    tenant: str
    wanted: VideoRequest
    order: Order
    size: tuple[int, int]
    kind: FilmKind
    created_at: int
    status: Status = "queued"
    progress: int = 0
    completed_at: int | None = None
    film: bytes = b""
    thumbnail: bytes = b""
    error: BraidError | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def num_bytes(self) -> int:
        return len(self.film) + len(self.thumbnail)

    def view(self) -> dict[str, Any]:
        error = None if self.error is None else {"code": self.error.code or self.error.type, "message": self.error.message}
        return {
            "id": self.id,
            "object": "video",
            "model": self.order.model,
            "status": self.status,
            "progress": self.progress,
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": None if self.completed_at is None else self.completed_at + LIFETIME_S,
            "prompt": self.wanted.prompt,
            "size": f"{self.size[1]}x{self.size[0]}",
            "seconds": str(self.wanted.seconds),
            "num_frames": self.wanted.num_frames,
            "seed": self.order.sampling.seed,
            "remixed_from_video_id": None,
            "error": error,
        }


class Videos:
    """All jobs, the oldest first."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="film")  # of their own: pictures must not wait for a long film

    def find(self, tenant: str, job_id: str) -> Job:
        """Raises: NotFoundError."""
        self._forget()
        job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise NotFoundError("there is no such video; videos are kept for an hour, and not over a restart of the server")
        return job

    def of_tenant(self, tenant: str) -> list[Job]:
        self._forget()
        return [job for job in self._jobs.values() if job.tenant == tenant]

    def start(self, job: Job) -> None:
        """Raises: OverloadedError."""
        self._forget()
        if sum(1 for each in self._jobs.values() if each.completed_at is None) >= MAX_RUNNING:
            raise OverloadedError("too many videos are being made at the moment", retry_after_s=1.0)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job), name=job.id)

    def delete(self, job: Job) -> None:
        """Also one that is being made, which ends. Mutates: the jobs."""
        del self._jobs[job.id]
        if job.task is not None:
            job.task.cancel()

    def _forget(self) -> None:
        over = [job for job in self._jobs.values() if job.completed_at is not None]
        num_bytes = sum(job.num_bytes for job in over)
        for place, job in enumerate(over):
            is_late = job.completed_at is not None and job.completed_at + LIFETIME_S < time.time()
            is_newest = place == len(over) - 1
            if is_late or (num_bytes > MAX_BYTES and not is_newest) or len(over) - place > MAX_KEPT:
                num_bytes -= job.num_bytes
                del self._jobs[job.id]

    async def _run(self, job: Job) -> None:
        """Until the film is there, or why it is not. Mutates: the job."""
        try:
            job.status = "in_progress"
            frames = await self._draw(job)
            height, width = job.size
            wanted = job.wanted

            def work() -> tuple[bytes, bytes]:
                resampled = [fitted(frame, height, width) for frame in frames]
                film = encode_film(resampled, float(wanted.seconds) / len(resampled), job.kind)
                return film, encode_picture(resampled[0], "png")

            job.film, job.thumbnail = await asyncio.get_running_loop().run_in_executor(self._thread, work)
            job.status, job.progress = "completed", 100
        except BraidError as error:
            job.status, job.error = "failed", error
        except Exception:
            log.exception("video %s failed", job.id)
            job.status, job.error = "failed", EngineError("The server had an error while it made this video.")
        finally:
            job.completed_at = int(time.time())

    async def _draw(self, job: Job) -> list[Pixels]:
        easel, drawing = self._studio.easel, list[asyncio.Task[Pixels]]()
        try:
            async with aclosing(easel.paint(job.order)) as items:
                async for item in items:
                    if isinstance(item, Frame):
                        order = job.order
                        drawing.append(asyncio.create_task(easel.draw(order.model, item.codes, order.errand)))
                        easel.backend.count_picture(order.model, order.errand.arrival)
                        job.progress = _DRAWN_SHARE * len(drawing) // job.wanted.num_frames
            return list(await asyncio.gather(*drawing))
        finally:
            for task in drawing:
                task.cancel()


def videos_router(studio: Studio, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError."""
    router = APIRouter(redirect_slashes=False)
    videos = Videos(studio)

    @router.post("/v1/videos")
    async def create_video(request: Request) -> Response:
        wanted, warnings, reference = await _read(request, limits)
        model, caller = studio.easel.choose(wanted.model), caller_of(request)
        pictures: list[Codes] = []
        if reference is not None:
            pictures = [await studio.see(model, reference[1], reference[0], Errand.of(caller, wanted))]
        job = _make_job(studio.easel, model, wanted, pictures, caller, warnings)
        videos.start(job)
        return json_answer(job.view(), warnings)

    @router.get("/v1/videos")
    async def list_videos(request: Request) -> Response:
        query = request.query_params
        limit, is_reversed = page_limit(query, 20, _MAX_LIST), is_descending(query)
        found = [job.view() for job in videos.of_tenant(caller_of(request).tenant)]
        return JSONResponse(page(found[::-1] if is_reversed else found, query.get("after"), limit))

    @router.get("/v1/videos/{video_id}")
    async def retrieve_video(request: Request, video_id: str) -> Response:
        job = videos.find(caller_of(request).tenant, video_id)
        headers = {} if job.completed_at is not None else {"openai-poll-after-ms": POLL_MS}
        return JSONResponse(job.view(), headers=headers)

    @router.get("/v1/videos/{video_id}/content")
    async def video_content(request: Request, video_id: str) -> Response:
        job = videos.find(caller_of(request).tenant, video_id)
        variant = request.query_params.get("variant", "video")
        if variant not in ("video", "thumbnail"):
            raise RequestError("variant must be video or thumbnail", param="variant")
        if job.status != "completed":
            raise ConflictError(f"the video is {job.status.replace('_', ' ')}; there is nothing to fetch")
        data, kind = (job.film, FILM_TYPES[job.kind]) if variant == "video" else (job.thumbnail, "image/png")
        return Response(data, media_type=kind, headers={"x-content-type-options": "nosniff"})

    @router.delete("/v1/videos/{video_id}")
    async def delete_video(request: Request, video_id: str) -> Response:
        job = videos.find(caller_of(request).tenant, video_id)
        videos.delete(job)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    return router


def _make_job(easel: Easel, model: str, wanted: VideoRequest, pictures: Sequence[Codes], caller: Caller, warnings: Warnings) -> Job:
    """Mutates: warnings. Raises: RequestError, UnavailableError."""
    native = easel.backend.info(model).picture_size
    size = wanted.size_of(native)
    if size != native:
        warnings.note("size", f"the model draws {native[1]}x{native[0]}; the film was resampled to {size[1]}x{size[0]}")
    if wanted.num_frames * size[0] * size[1] > MAX_PIXELS:
        raise RequestError(f"a film has at most {MAX_PIXELS} pixels in all its frames", param="size")
    kind = wanted.output_format or film_kinds()[0]
    if kind not in film_kinds():
        raise RequestError(f"this server makes no {kind}; there are {' and '.join(film_kinds())}", param="output_format")
    if kind == "mp4" and (size[0] % 2 or size[1] % 2):
        raise RequestError("size must have an even width and height as mp4", param="size")
    try:
        order = make_order(easel, model, Brief(wanted.prompt, tuple(pictures), num_frames=wanted.num_frames), wanted, caller, warnings)
    except ContextLengthError as error:
        error.param = "num_frames" if wanted.num_frames > 1 else "prompt"
        raise
    return Job(f"video_{uuid.uuid4().hex}", caller.tenant, wanted, order, size, kind, int(time.time()))


async def _read(request: Request, limits: BodyLimits) -> tuple[VideoRequest, Warnings, Source | None]:
    """Of JSON or of a form. Raises: RequestError and its kinds."""
    if not is_form(request):
        wanted, warnings = await parse_either(request, VideoRequest, limits)
        return wanted, warnings, wanted.input_reference.at("input_reference") if wanted.input_reference is not None else None
    form_limits = FormLimits(limits.max_bytes, 1, 32, 128 * 1024, limits.idle_s, "input_reference", limits.origins)
    async with read_form(request, form_limits) as form:
        wanted, warnings = checked(form_texts(form, ("input_reference",)), VideoRequest, limits.is_strict, is_form=True)
        with limits.room.share() as share:
            references = [await form_file(value, "input_reference", share) for value in form.getlist("input_reference")]
    return wanted, warnings, references[0] if references else None
