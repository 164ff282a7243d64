"""Reads an untrusted zip entry by entry; nothing is ever extracted to a path.

`zipfile` is not used: it parses a directory of millions of entries into memory before one can look, and before
Python 3.11.8 it does not notice entries that overlap (CVE-2024-0450). What is left without ZIP64, encryption and
rare methods is small. An entry is read by the directory's word and must then agree with it: size, checksum, name.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.datasets import paths
from app.datasets.decoding import kind
from app.datasets.members import Member, escaped, pointer
from app.datasets.receive import too_many_files
from app.datasets.report import Findings
from app.errors import Finding, Invalid, UnsupportedMedia

#: An entry that unpacks to more than this many times its size is a bomb; images hardly shrink.
MAX_RATIO = 100
_RATIO_FROM_BYTES = 2**20  # smaller entries may shrink as they like

_DIRECTORY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_MAX_COMMENT = 0xFFFF
_ZIP64 = 0xFFFFFFFF
_UTF8 = 0x800
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True)
class Entry:
    """One record of the directory. `name` is None where it is not UTF-8."""

    raw_name: bytes
    name: str | None
    flags: int
    method: int
    checksum: int
    packed: int
    size: int
    mode: int
    offset: int  # of its local header

    @property
    def shown(self) -> str:
        return self.raw_name.decode("utf-8", "replace") if self.name is None else self.name

    @property
    def is_folder(self) -> bool:
        return self.raw_name.endswith(b"/") and self.size == 0


@contextmanager
def members(
    path: Path, *, max_files: int, max_file_bytes: int, max_total_bytes: int
) -> Iterator[list[Member]]:
    """The files of the zip at `path`, readable until the context ends.

    Raises `Invalid` with every finding, or `UnsupportedMedia` for what is no zip.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        _check_format(handle)
        entries, directory = _entries(handle, 3 * max_files + 1000)
        files = [entry for entry in entries if not entry.is_folder]
        findings = [finding for entry in entries for finding in _entry_findings(entry)]
        findings += _bombs(files, max_total_bytes)
        findings += _overlaps(handle, entries, directory)
        Findings(faults=findings).refuse()
        yield [Member(entry.shown, entry.size, _Content(handle, entry, max_file_bytes)) for entry in files]
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Content:
    """Reads one entry; safe in several threads. Raises `ValueError` where the content is damaged."""

    handle: int
    entry: Entry
    limit: int

    def __call__(self) -> bytes:
        entry = self.entry
        start = _data_start(self.handle, entry)
        packed = os.pread(self.handle, min(entry.packed, 2 * self.limit), start)
        content = packed
        if entry.method == _DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
            except zlib.error as error:
                raise ValueError(str(error)) from None
        if len(content) != entry.size or zlib.crc32(content) != entry.checksum:
            raise ValueError("its size or checksum differs from the zip's directory")
        return content


def _check_format(handle: int) -> None:
    head = os.pread(handle, 262, 0)
    if not head:
        raise Invalid("The archive is empty (0 bytes). Send a zip of class folders.", code="zip_corrupt")
    found = kind(head)
    if found != "zip archive":
        what = f"is a {found} file" if found else "is no zip archive"
        raise UnsupportedMedia(
            f"The upload {what}. Only zip is accepted: zip the folder that holds the class folders, or send the "
            "images as files named class/file.",
            code="archive_format",
        )


def _entries(handle: int, limit: int) -> tuple[list[Entry], int]:
    """The records of the directory, and where it starts. Raises `Invalid` where there are more than `limit`."""
    file_size = os.fstat(handle).st_size
    tail_start = max(0, file_size - _END.size - _MAX_COMMENT)
    tail = os.pread(handle, file_size - tail_start, tail_start)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or found + _END.size > len(tail):
        raise _corrupt("its directory at the end is missing, as when an upload or a copy was cut off")
    _, disk, _, _, count, size, start, comment = _END.unpack_from(tail, found)
    if disk or _ZIP64 in (size, start) or count == 0xFFFF:
        raise _corrupt("it is in several pieces or in the ZIP64 form")
    if found + _END.size + comment != len(tail) or start + size != tail_start + found:
        raise _corrupt("its directory is not where its end record says")
    entries: list[Entry] = []
    position = start
    while position < start + size:
        record = os.pread(handle, _DIRECTORY.size + 0xFFFF, position)[: start + size - position]
        if len(record) < _DIRECTORY.size or record[:4] != b"PK\x01\x02":
            raise _corrupt("its directory is damaged")
        if len(entries) >= limit:
            raise too_many_files(limit)
        entry, length = _entry(record)
        entries.append(entry)
        position += length
    return entries, start


def _entry(record: bytes) -> tuple[Entry, int]:
    fields = _DIRECTORY.unpack_from(record)
    flags, method, checksum, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
    name_length, extra, comment, attributes, offset = (
        fields[10],
        fields[11],
        fields[12],
        fields[15],
        fields[16],
    )
    length = _DIRECTORY.size + name_length + extra + comment
    if length > len(record) or _ZIP64 in (packed, size, offset):
        raise _corrupt("its directory is damaged or in the ZIP64 form")
    raw = record[_DIRECTORY.size : _DIRECTORY.size + name_length]
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = None
    return Entry(raw, name, flags, method, checksum, packed, size, attributes >> 16, offset), length


def _entry_findings(entry: Entry) -> Iterator[Finding]:
    def finding(code: str, detail: str) -> Finding:
        return Finding(code, pointer(entry.shown), f"{escaped(entry.shown).replace('~1', '/')}: {detail}")

    if entry.name is None:
        yield finding(
            "name_encoding", "its name is not UTF-8. Zip with a tool that writes UTF-8 names, or rename it."
        )
    elif entry.is_folder and (danger := paths.danger(entry.name)):
        yield finding(*danger)
    if entry.flags & _ENCRYPTED:
        yield finding("zip_encrypted", "it is encrypted. Zip without a password.")
    elif not entry.is_folder and entry.method not in (_STORED, _DEFLATED):
        yield finding(
            "zip_method", "it is packed by a rare method. Zip with the usual one (deflate) or none."
        )
    if stat.S_IFMT(entry.mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield finding("zip_link", "it is a link or a device. Put the image itself into the zip.")


def _bombs(files: Sequence[Entry], max_total_bytes: int) -> Iterator[Finding]:
    for entry in files:
        if entry.size > _RATIO_FROM_BYTES and entry.size > MAX_RATIO * entry.packed:
            yield Finding(
                "zip_bomb",
                pointer(entry.shown),
                f"{entry.shown}: it unpacks to more than {MAX_RATIO} times its size, which images do not. Remove it.",
            )
    total = sum(entry.size for entry in files)
    if total > max_total_bytes:
        yield Finding(
            "zip_bomb",
            "/archive",
            f"The zip unpacks to {total / 2**20:,.0f} MiB; at most {max_total_bytes / 2**20:,.0f} MiB are accepted. "
            "Scale the images down, for example to 1024 pixels.",
        )


def _overlaps(handle: int, entries: Sequence[Entry], directory: int) -> Iterator[Finding]:
    """Entries must lie one after the other, each under its own name."""
    ordered = sorted(entries, key=lambda entry: entry.offset)
    limits = [*(entry.offset for entry in ordered), directory]
    for entry, end in zip(ordered, limits[1:], strict=True):
        try:
            overlaps = _data_start(handle, entry) + entry.packed > end
        except ValueError as error:
            yield Finding(
                "zip_corrupt", pointer(entry.shown), f"{entry.shown}: {error}. Zip the folder again."
            )
            continue
        if overlaps:
            yield Finding(
                "zip_bomb",
                pointer(entry.shown),
                f"{entry.shown}: it overlaps with another entry of the zip. Zip the folder again with a common tool.",
            )


def _data_start(handle: int, entry: Entry) -> int:
    header = os.pread(handle, _LOCAL.size + len(entry.raw_name), entry.offset)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise ValueError("the zip's directory points to where it is not")
    name_length, extra = _LOCAL.unpack_from(header)[-2:]
    if name_length != len(entry.raw_name) or header[_LOCAL.size :] != entry.raw_name:
        raise ValueError("it has another name in the zip's directory")
    return entry.offset + _LOCAL.size + int(name_length) + int(extra)


def _corrupt(reason: str) -> Invalid:
    detail = f"The zip cannot be read: {reason}. Zip the folder again with a common tool and send it whole."
    return Invalid(detail, code="zip_corrupt", findings=(Finding("zip_corrupt", "/archive", detail),))
