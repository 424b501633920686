"""What the routes share that take or give pictures: where pictures come from, where they are read and drawn, and where they are kept.

No HTTP and no form of an answer. Made once, by the app.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.api.easel import Codes, Easel, Errand
from service.api.gallery import Gallery
from service.api.media import Media
from service.codec.pixels import encode_picture


@dataclass(frozen=True, slots=True)
class Studio:
    easel: Easel
    media: Media
    gallery: Gallery

    async def see(self, model: str, source: str | bytes, param: str, errand: Errand) -> Codes:
        """The codes of a picture that a client brought. Raises: RequestError naming param; what `Easel.encode` raises."""
        size = self.easel.backend.info(model).picture_size
        return await self.easel.encode(model, await self.media.pixels(source, size, param), errand)

    async def show(self, model: str, codes: Codes, errand: Errand) -> bytes:
        """A PNG of codes, in the size that the model draws. Raises: what `Easel.draw` raises."""
        pixels = await self.easel.draw(model, codes, errand)
        return await self.media.apart(lambda: encode_picture(pixels, "png"), "modalities")
