"""One hostile image of a request as pixels: checked, and decoded in a child process that stays for the next."""

from __future__ import annotations

import io
import threading
from contextlib import ExitStack

import numpy as np
from PIL import Image

from app.datasets import decoding
from app.errors import Invalid, TooLarge, UnsupportedMedia
from app.settings import Settings

#: The decoder keeps no longer side than this.
_MAX_PIXELS = 1024 * 1024


class ImageReader:
    """One decoder child at a time, started at first use. Safe to call from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._decoder: decoding.Decoder | None = None
        self._lock = threading.Lock()
        self._opened = ExitStack()

    def pixels(self, content: bytes) -> np.ndarray:
        """uint8 [H, W, 3], RGB and upright. Raises `TooLarge`, `UnsupportedMedia` or `Invalid`."""
        if not content:
            raise Invalid(
                "The body is empty. Send one JPEG, PNG or WebP image as the body.", code="image_empty"
            )
        if len(content) > self._settings.max_image_bytes:
            most = self._settings.max_image_bytes
            raise TooLarge(f"The image has {len(content):,} bytes; at most {most:,} are read.")
        kind = decoding.kind(content[:512])
        if kind not in decoding.ACCEPTED:
            what = f"a {kind} file" if kind else "no image that is known here"
            raise UnsupportedMedia(f"This is {what}. Send a JPEG, PNG or WebP image.", code="image_format")
        try:
            with self._lock:
                clean = self._running_decoder().clean(content)
        except decoding.ImageRejected as rejected:
            raise Invalid(f"The image cannot be used: {rejected.detail}", code=rejected.code) from rejected
        if clean.width * clean.height > _MAX_PIXELS:
            raise Invalid("The image cannot be used: it is too large.", code="image_too_large")
        with Image.open(io.BytesIO(clean.content), formats=("JPEG", "PNG")) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)

    def close(self) -> None:
        with self._lock:
            self._opened.close()
            self._decoder = None

    def _running_decoder(self) -> decoding.Decoder:
        if self._decoder is None:
            self._decoder = self._opened.enter_context(
                decoding.Decoder(
                    max_pixels=self._settings.max_image_pixels, timeout_s=self._settings.image_timeout_s
                )
            )
        return self._decoder
