"""Answers that are already rendered, for as long as what they show has the same version."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock


class Rendered:
    """The newest rendering of the things asked for last, by id and version."""

    def __init__(self, most: int = 2000) -> None:
        self._most = most
        self._kept: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        self._lock = Lock()

    def get(self, id: str, version: int) -> bytes | None:
        kept = self._kept.get(id)
        return kept[1] if kept is not None and kept[0] == version else None

    def put(self, id: str, version: int, rendering: bytes) -> None:
        with self._lock:
            self._kept[id] = (version, rendering)
            self._kept.move_to_end(id)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
