"""A blob as an HTTP answer: strong ETag, If-None-Match, one Range, sha-256 digests (RFC 9110, RFC 9530)."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import BinaryIO

import structlog
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from app.errors import DramError, RangeNotSatisfiable
from app.storage import BlobStore

log = structlog.get_logger()

_CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def serve(
    request: Request, blobs: BlobStore, digest: str, *, name: str, media_type: str, inline: bool = False
) -> Response:
    """Answer a GET or HEAD with the blob as the file `name`. The caller has checked that it may be read."""
    headers = {
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{_base64(digest)}:",
        "Digest": f"sha-256={_base64(digest)}",
        "Content-Disposition": f'{"inline" if inline else "attachment"}; filename="{name}"',
        "Cache-Control": "private, no-cache",  # keep it, but ask each time: the key may have been revoked
    }
    if _matches(request.headers.get("if-none-match"), digest):
        return Response(status_code=304, headers=headers)
    try:
        size = blobs.size(digest)
        wanted = _wanted(request, digest, size)
        start, end = wanted or (0, size)
        headers["Content-Length"] = str(end - start)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206 if wanted else 200
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=media_type)
        content = _pieces(blobs.open(digest), start, end)
    except FileNotFoundError as error:
        log.error("blob_missing", digest=digest)
        raise DramError(
            f"The file '{name}' is missing from the store. Tell the operator; quote the request_id.",
            code="blob_missing",
        ) from error
    return StreamingResponse(content, status_code=status, headers=headers, media_type=media_type)


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _matches(header: str | None, digest: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or f'"{digest}"' in tags


def _wanted(request: Request, digest: str, size: int) -> tuple[int, int] | None:
    """The asked part as [start, end), or None for the whole. Several parts, or another unit, give the whole."""
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    unless = request.headers.get("if-range")
    if (
        match is None
        or match[1] == match[2] == ""
        or (unless is not None and unless.strip() != f'"{digest}"')
    ):
        return None
    first, last = (int(number[:18]) if number else None for number in match.groups())
    if first is None:
        start, end = max(0, size - (last or 0)), size
    else:
        start, end = first, size if last is None else min(last + 1, size)
        if last is not None and last < first:
            return None
    if start >= end:
        raise RangeNotSatisfiable(
            f"The file has {size} bytes; the asked part lies outside.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = end - start
        while left > 0 and (piece := file.read(min(_CHUNK, left))):
            left -= len(piece)
            yield piece
