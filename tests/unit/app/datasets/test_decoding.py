"""The decoder's parent against children that crash, hang and lie; the child's own limits."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from app.datasets import decoding
from app.datasets.decoding import Decoder, ImageRejected

HOSTILE = """
import json, os, runpy, signal, struct, sys, time
decoder = runpy.run_path({program!r}, run_name="decoder")
honest = decoder["clean"]
def clean(content, max_pixels):
    if content == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if content == b"hang":
        time.sleep(60)
    if content == b"spin":
        while True: pass
    if content == b"leave":
        os._exit(0)
    if content == b"flood":
        sys.stdout.buffer.write(struct.pack(">I", 2**31)); sys.stdout.buffer.flush(); time.sleep(60)
    if content == b"noise":
        return {{"width": 5}}, b""
    if content == b"program":
        return dict(width=1, height=1, original_width=1, original_height=1, rotated=False), b"#!/bin/sh"
    return honest(content, max_pixels)
decoder["main"].__globals__["clean"] = clean
decoder["main"]()
"""


def picture() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (50, 40), "teal").save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[Decoder]:
    program = tmp_path / "hostile.py"
    program.write_text(HOSTILE.format(program=str(decoding.PROGRAM)))
    with Decoder(max_pixels=1_000_000, timeout_s=1, program=program) as decoder:
        yield decoder


@pytest.mark.parametrize("content", [b"crash", b"hang", b"spin", b"leave", b"flood", b"noise", b"program"])
def test_a_child_that_fails_costs_that_image_only(content: bytes, decoder: Decoder) -> None:
    assert decoder.clean(picture()).width == 50
    started = time.monotonic()
    with pytest.raises(ImageRejected) as rejected:
        decoder.clean(content)
    assert rejected.value.code == "image_corrupt"
    assert ("longer than 1 s" in rejected.value.detail) == (content in (b"hang", b"spin"))
    assert time.monotonic() - started < 10
    assert decoder.clean(picture()).width == 50


def test_no_child_is_left(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with Decoder(max_pixels=1_000_000, timeout_s=1) as decoder:
        decoder.clean(picture())
        (child,) = set(psutil.Process().children()) - before
        assert os.getsid(child.pid) == child.pid
        assert child.environ().keys() <= {"LANG", "LC_CTYPE"}
    assert not child.is_running()


def test_a_fresh_child_takes_over_after_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "IMAGES_PER_CHILD", 2)
    seen = set()
    before = set(psutil.Process().children())
    with Decoder(max_pixels=1_000_000, timeout_s=5) as decoder:
        for _ in range(5):
            decoder.clean(picture())
            seen |= {child.pid for child in set(psutil.Process().children()) - before}
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("bytearray(2**30)", "MemoryError"),
        ("open('/tmp/dram-escape', 'w').write('x' * 10000)", "File too large"),
        ("[open('/dev/null') for _ in range(20)]", "Too many open files"),
    ],
)
def test_the_child_gives_up_what_decoding_does_not_need(attempt: str, error: str, tmp_path: Path) -> None:
    program = (
        f"import runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"runpy.run_path({str(decoding.PROGRAM)!r}, run_name='decoder')['confine'](1_000_000, {os.getpid()})\n"
        f"{attempt.replace('/tmp/dram-escape', str(tmp_path / 'escape'))}\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert outcome.returncode == 1
    assert error in outcome.stderr


def test_a_computing_child_ends_by_itself_even_without_a_parent_that_watches() -> None:
    program = (
        f"import runpy\nrunpy.run_path({str(decoding.PROGRAM)!r}, run_name='decoder')['allow_cpu'](0.1)\n"
        "while True: pass\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == -24
    )  # SIGXCPU


def test_formats_are_told_by_content() -> None:
    for form, name in (
        ("JPEG", "JPEG"),
        ("PNG", "PNG"),
        ("WEBP", "WebP"),
        ("GIF", "GIF"),
        ("TIFF", "TIFF"),
        ("BMP", "BMP"),
    ):
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8)).save(encoded, form)
        assert decoding.kind(encoded.getvalue()) == name
    assert decoding.kind(b"RIFF\0\0\0\0WAVE") == ""
    assert decoding.kind(b"") == ""


def test_a_child_that_is_killed_at_work_costs_no_image(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the thread that started it ends just then."""
    decoder.clean(picture())
    first = decoder._child
    assert first is not None
    feed = decoding._pipes

    def killed(child: subprocess.Popen[bytes] | None) -> object:
        if child is first and child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
        return feed(child)

    monkeypatch.setattr(decoding, "_pipes", killed)
    assert decoder.clean(picture()).width == 50
    assert decoder._child is not first


def test_a_child_that_ended_with_the_thread_that_started_it_is_replaced(decoder: Decoder) -> None:
    """A server's pool of threads shrinks when less is asked of it."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(decoder.clean, picture()).result().width == 50
    ended = decoder._child
    assert ended is not None
    assert ended.wait(30) == -signal.SIGKILL
    assert decoder.clean(picture()).width == 50


def test_images_and_masks_are_decoded_by_one_child_in_turn(decoder: Decoder) -> None:
    mask = io.BytesIO()
    Image.new("L", (50, 40), 3).save(mask, "PNG")
    assert decoder.clean(picture()).width == 50
    child = decoder._child
    found = decoder.clean_mask(mask.getvalue(), 50, 40)
    assert (found.original, found.values) == ((50, 40), {3})
    assert decoder.clean(picture()).width == 50
    assert decoder._child is child


@pytest.mark.parametrize(
    "answer",
    ["{'original_width': 5, 'original_height': 4, 'values': [300]}, PNG", "{'values': [1]}, PNG",
     "{'original_width': 5, 'original_height': 4, 'values': [1]}, b'#!/bin/sh'",
     "{'original_width': 0, 'original_height': 4, 'values': [1]}, PNG"],
    ids=["value", "no size", "no PNG", "empty"],
)  # fmt: skip
def test_what_a_child_says_of_a_mask_is_not_believed(answer: str, tmp_path: Path) -> None:
    program = tmp_path / "lying.py"
    program.write_text(
        f"import runpy\ndecoder = runpy.run_path({str(decoding.PROGRAM)!r}, run_name='decoder')\n"
        f"PNG = {picture()!r}\n"
        f"decoder['main'].__globals__['clean_mask'] = lambda *_: ({answer})\ndecoder['main']()\n"
    )
    with Decoder(max_pixels=1_000_000, timeout_s=5, program=program) as decoder:
        with pytest.raises(ImageRejected):
            decoder.clean_mask(picture(), 5, 4)
        assert decoder.clean(picture()).width == 50
