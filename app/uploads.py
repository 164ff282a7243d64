"""Bodies that a route reads itself: a small one into memory, an upload into a folder on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from app.datasets import receive, workspace
from app.datasets.members import Upload
from app.datasets.workspace import Workspace
from app.errors import BadRequest, TooLarge
from app.settings import Settings

#: A text field of a form has no more bytes unless its route says so.
MAX_FIELD_BYTES = 2**14


async def in_memory(request: Request, most: int, what: str) -> bytes:
    """The body. Raises `TooLarge` as soon as it has more than `most` bytes; `what` names it."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise TooLarge(f"{what} has more than {most:,} bytes. Send a smaller one.")
    return bytes(content)


@asynccontextmanager
async def on_disk(
    request: Request,
    settings: Settings,
    *,
    copies: int,
    max_files: int,
    max_field_bytes: int = MAX_FIELD_BYTES,
) -> AsyncIterator[Upload]:
    """The body's files in a folder of their own, which is removed in the end.

    `copies`: how often the upload will be on the disk at the same time. Raises `InsufficientStorage` before anything
    is read or when the disk is full, `BadRequest` where the client leaves before the end, and what `receive` raises.
    """
    length = request.headers.get("content-length", "")
    workspace.check_room(settings, copies * int(length) if length.isdecimal() else 0)
    made = await anyio.to_thread.run_sync(Workspace.create, settings)
    try:
        yield await _received(request, made, max_files, max_field_bytes)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(made.remove)


async def _received(request: Request, made: Workspace, max_files: int, max_field_bytes: int) -> Upload:
    try:
        with workspace.no_room_is_507():
            return await receive.receive(
                request.stream(),
                request.headers.get("content-type", ""),
                made.folder,
                max_files=max_files,
                max_field_bytes=max_field_bytes,
            )
    except ClientDisconnect:
        raise BadRequest(
            "The connection was lost before the upload was complete. Nothing was stored; send it again.",
            code="upload_incomplete",
        ) from None
