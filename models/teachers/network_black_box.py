"""A network of the catalogue, with its few-shot head, as a black box: only its probabilities are given away."""

from __future__ import annotations

import torch

from models.data import images as image_tensors
from models.teachers.black_box import AnswerKind, Answers, Pixels
from models.teachers.few_shot_head import FewShotHead
from models.teachers.protocol import Teacher


class NetworkBlackBox:
    """`key` names the answers of this network with this head."""

    answers = AnswerKind.PROBABILITIES
    batch_size = 64
    concurrency = 1  # torch uses all of the processor for one batch
    retries = 0

    def __init__(self, teacher: Teacher, head: FewShotHead, key: str) -> None:
        self.key = key
        self.classes = head.classes
        self._teacher = teacher
        self._head = head

    def answer(self, images: list[Pixels]) -> Answers:
        """Probabilities [N, C] for N images [H, W, 3] of any sizes."""
        size = self._teacher.input_size
        squeezed = [
            image_tensors.resize(torch.from_numpy(image).permute(2, 0, 1)[None], size) for image in images
        ]
        features = self._teacher.embed(torch.cat(squeezed))
        rows: Answers = self._head.logits(features).softmax(-1).cpu().numpy()
        return rows

    def close(self) -> None:
        return None
