"""From a request body to one file on disk. Memory stays flat however large the body is.

Starlette's own form parser keeps up to 1 MiB of every file in memory and the rest in one temporary file each;
with 10,000 files that is neither flat nor within the limit of open files.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from app.datasets.members import Part, Upload
from app.errors import BadRequest, Finding, Invalid, UnsupportedMedia

ZIP_TYPES = {b"application/zip", b"application/x-zip-compressed", b"application/octet-stream"}
#: What is collected before a thread writes it.
_WRITE_BYTES = 2**20
_MAX_FIELDS = 16


async def receive(
    stream: AsyncIterator[bytes],
    content_type: str,
    folder: Path,
    *,
    max_files: int,
    max_field_bytes: int,
) -> Upload:
    """Write the body's files to `folder`. Raises `BadRequest`, `UnsupportedMedia` or `Invalid`."""
    media_type, options = parse_options_header(content_type)
    path = folder / "received"
    with path.open("wb") as file:
        spool = _Spool(file)
        if media_type == b"multipart/form-data":
            form = _Form(spool, max_files, max_field_bytes)
            parts, fields = await _receive_form(stream, options.get(b"boundary", b""), spool, form)
        elif media_type in ZIP_TYPES:
            async for chunk in stream:
                await spool.write(chunk)
            await spool.flush()
            parts, fields = [Part(b"", "application/zip", 0, spool.size)], {}
        else:
            raise UnsupportedMedia(
                f"A data set cannot be sent as '{content_type[:100]}'. Send multipart/form-data with one zip of class "
                "folders or with files named class/file, or the zip alone as application/zip."
            )
    return Upload(path, tuple(parts), fields, folder)


class _Spool:
    """Appends to a file in a thread, a good piece at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._pending = bytearray()

    def add(self, data: bytes) -> None:
        self._pending += data
        self.size += len(data)

    async def write(self, data: bytes) -> None:
        self.add(data)
        if len(self._pending) >= _WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await anyio.to_thread.run_sync(self._file.write, pending)


async def _receive_form(
    stream: AsyncIterator[bytes], boundary: bytes, spool: _Spool, form: _Form
) -> tuple[list[Part], dict[str, str]]:
    if not boundary:
        raise _malformed("its Content-Type names no boundary")
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        async for chunk in stream:
            parser.write(chunk)
            await spool.write(b"")
        await spool.flush()
        parser.finalize()
    except FormParserError as error:
        raise _malformed(str(error).split(" at")[0].lower()) from None
    if not form.ended:
        raise BadRequest(
            "The form ends before its closing boundary: the upload was cut off. Nothing was stored; send it again.",
            code="upload_incomplete",
        )
    return form.parts, form.fields


class _Form:
    """The parser's callbacks: file content goes to the spool, text fields and headers stay in memory, capped."""

    def __init__(self, spool: _Spool, max_files: int, max_field_bytes: int) -> None:
        self.parts: list[Part] = []
        self.fields: dict[str, str] = {}
        self.ended = False
        self._spool = spool
        self._max_files = max_files
        self._max_field_bytes = max_field_bytes
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._field = ""
        self._text = bytearray()
        self._file: tuple[bytes, int] | None = None

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers = {}

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise _malformed("a part has no Content-Disposition with a name")
        self._field = options[b"name"].decode("utf-8", "replace")
        self._text = bytearray()
        self._file = (options[b"filename"], self._spool.size) if b"filename" in options else None
        if self._file is None and len(self.fields) >= _MAX_FIELDS:
            raise _malformed(f"it has more than {_MAX_FIELDS} text fields")
        if self._file is not None and len(self.parts) >= self._max_files:
            raise too_many_files(self._max_files)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._spool.add(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > self._max_field_bytes:
            raise _malformed(f"a text field has more than {self._max_field_bytes:,} bytes")

    def _close(self) -> None:
        if self._file is None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")
            return
        name, offset = self._file
        content_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self.parts.append(Part(name, content_type, offset, self._spool.size - offset, self._field))

    def _end(self) -> None:
        self.ended = True


def too_many_files(limit: int, what: str = "files") -> Invalid:
    detail = f"The upload has more than {limit:,} {what}. Split it, or leave out some of the images."
    return Invalid(detail, code="too_many_files", findings=(Finding("too_many_files", "/files", detail),))


def _malformed(reason: str) -> BadRequest:
    return BadRequest(
        f"The form cannot be read: {reason}. Send it as an HTTP library's multipart/form-data writes it.",
        code="multipart_malformed",
    )
