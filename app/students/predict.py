"""One image through a student, on CPU onnxruntime. The image is hostile and is decoded in a child process."""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnxruntime
from PIL import Image

from app.datasets import decoding
from app.errors import Invalid, TooLarge, UnsupportedMedia
from app.settings import Settings
from app.storage import BlobStore

#: Students kept ready. They are small: a few megabytes each.
READY_STUDENTS = 16
#: The decoder keeps no longer side than this.
_MAX_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class Score:
    label: str
    score: float


@dataclass(frozen=True)
class LoadedStudent:
    """An onnxruntime session (safe to run from several threads) and the labels in the order of its scores."""

    session: onnxruntime.InferenceSession
    labels: tuple[str, ...]

    @classmethod
    def load(cls, graph: bytes) -> LoadedStudent:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests run side by side already
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
        return cls(session, tuple(str(label) for label in labels))

    def scores(self, pixels: np.ndarray) -> list[Score]:
        """`pixels`: uint8 [1, H, W, 3] RGB of any size. The most likely label first."""
        (probabilities,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels})
        pairs = zip(self.labels, probabilities[0].tolist(), strict=True)
        return [Score(label, score) for label, score in sorted(pairs, key=lambda pair: -pair[1])]


class Predictor:
    """Answers for all students of this process: the newest sessions kept, one decoder child at a time."""

    def __init__(self, settings: Settings, blobs: BlobStore) -> None:
        self._settings = settings
        self._blobs = blobs
        self._ready: OrderedDict[str, LoadedStudent] = OrderedDict()
        self._ready_lock = threading.Lock()
        self._decoder: decoding.Decoder | None = None
        self._decoder_lock = threading.Lock()
        self._opened = ExitStack()

    def predict(self, digest: str, content: bytes) -> list[Score]:
        """Scores of an encoded image by the ONNX file with this digest.

        Raises `TooLarge`, `UnsupportedMedia` or `Invalid` where the image cannot be used.
        """
        pixels = self._pixels(content)
        return self._student(digest).scores(pixels)

    def close(self) -> None:
        with self._decoder_lock:
            self._opened.close()
            self._decoder = None

    def _pixels(self, content: bytes) -> np.ndarray:
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
            with self._decoder_lock:
                clean = self._running_decoder().clean(content)
        except decoding.ImageRejected as rejected:
            raise Invalid(f"The image cannot be used: {rejected.detail}", code=rejected.code) from rejected
        if clean.width * clean.height > _MAX_PIXELS:
            raise Invalid("The image cannot be used: it is too large.", code="image_too_large")
        with Image.open(io.BytesIO(clean.content), formats=("JPEG", "PNG")) as image:
            return np.asarray(image.convert("RGB"), dtype=np.uint8)[None]

    def _running_decoder(self) -> decoding.Decoder:
        if self._decoder is None:
            self._decoder = self._opened.enter_context(
                decoding.Decoder(
                    max_pixels=self._settings.max_image_pixels, timeout_s=self._settings.image_timeout_s
                )
            )
        return self._decoder

    def _student(self, digest: str) -> LoadedStudent:
        with self._ready_lock:
            if digest in self._ready:
                self._ready.move_to_end(digest)
                return self._ready[digest]
        with self._blobs.open(digest) as file:
            loaded = LoadedStudent.load(file.read())
        with self._ready_lock:
            self._ready[digest] = loaded
            while len(self._ready) > READY_STUDENTS:
                self._ready.popitem(last=False)
        return loaded
