"""One image through a student, on CPU onnxruntime. The image is hostile and is decoded in a child process."""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import onnxruntime
from PIL import Image

from app.datasets.one_image import ImageReader
from app.settings import Settings
from app.storage import BlobStore

#: Students kept ready: so many, and so many bytes of their files, but always the newest one. Most take a few megabytes;
#: a shortened vision transformer may take hundreds.
READY_STUDENTS = 16
READY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Score:
    label: str
    score: float


@dataclass(frozen=True)
class LoadedStudent:
    """An onnxruntime session (safe to run from several threads), the labels in the order of its scores, and how many
    bytes its file has.
    """

    session: onnxruntime.InferenceSession
    labels: tuple[str, ...]
    size: int

    @classmethod
    def load(cls, graph: bytes) -> LoadedStudent:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # requests run side by side already
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
        return cls(session, tuple(str(label) for label in labels), len(graph))

    def scores(self, pixels: np.ndarray) -> list[Score]:
        """`pixels`: uint8 [1, H, W, 3] RGB of any size. The most likely label first."""
        (probabilities,) = self.session.run(None, {self.session.get_inputs()[0].name: pixels})
        pairs = zip(self.labels, probabilities[0].tolist(), strict=True)
        return [Score(label, score) for label, score in sorted(pairs, key=lambda pair: -pair[1])]

    def class_map(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W], the index of each pixel's label, of a student that gives class maps. `pixels` as above."""
        give_back = onnxruntime.RunOptions()  # a session would keep what the largest image's logits took
        give_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        (classes,) = self.session.run(["classes"], {self.session.get_inputs()[0].name: pixels}, give_back)
        found: np.ndarray = classes[0]
        return found


class Predictor:
    """Answers for all students of this process: the newest sessions kept, one decoder child at a time."""

    def __init__(self, settings: Settings, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._ready: OrderedDict[str, LoadedStudent] = OrderedDict()
        self._ready_lock = threading.Lock()
        self._images = ImageReader(settings)

    def predict(self, digest: str, content: bytes) -> list[Score]:
        """Scores of an encoded image by the ONNX file with this digest.

        Raises `TooLarge`, `UnsupportedMedia` or `Invalid` where the image cannot be used.
        """
        pixels = self._images.pixels(content)
        return self._student(digest).scores(pixels[None])

    def class_map(self, digest: str, content: bytes) -> bytes:
        """The class map of an encoded image, an 8-bit grey PNG. Raises as `predict` does."""
        pixels = self._images.pixels(content)
        encoded = io.BytesIO()
        Image.fromarray(self._student(digest).class_map(pixels[None])).save(encoded, "PNG")
        return encoded.getvalue()

    def close(self) -> None:
        self._images.close()

    def _student(self, digest: str) -> LoadedStudent:
        with self._ready_lock:
            if digest in self._ready:
                self._ready.move_to_end(digest)
                return self._ready[digest]
        with self._blobs.open(digest) as file:
            loaded = LoadedStudent.load(file.read())
        with self._ready_lock:
            self._ready[digest] = loaded
            while self._too_many():
                self._ready.popitem(last=False)
        return loaded

    def _too_many(self) -> bool:
        weight = sum(student.size for student in self._ready.values())
        return len(self._ready) > READY_STUDENTS or (len(self._ready) > 1 and weight > READY_BYTES)
