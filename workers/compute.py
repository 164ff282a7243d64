"""Child side: the only door to torch. Reads claims as JSON lines, runs their stages, answers with messages.

It never touches the database: it reads and stores blobs, and tells its parent, which holds the lease.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from app import locks, storage
from app.security.egress import Egress
from app.settings import HANDED_ON, Settings
from app.storage import BlobStore
from models import generators, runtime
from models.errors import ModelsError, TryAgain
from models.methods import METHODS
from models.pipeline import JobShape, StageContext, TeacherAccess, inputs_of
from workers.asking import PipeLedger

_REPORT_PAUSE_S = 0.2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # its memory holds the users' secret headers
    settings = Settings.model_validate_json(os.environ.pop(HANDED_ON))
    runtime.use_bfloat16_on_cpu(settings.cpu_bfloat16)
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    blobs = storage.connect(settings.storage, settings.storage_options)
    work = own_folder(settings.home / "work")
    voice = Voice(out, sys.stdin.buffer)
    for line in sys.stdin.buffer:
        run(json.loads(line), settings, blobs, voice, work)
    shutil.rmtree(work, ignore_errors=True)


def own_folder(root: Path) -> Path:
    """A folder for this process, locked while it lives. Removes those that dead processes left.

    Not by process ids: the workers of several containers may share `root`, and count theirs from one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with locks.holding(root):  # nobody takes a folder for dead that is not locked yet
        for folder in root.iterdir():
            if (handle := locks.take(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
        if locks.take(folder) is None:  # held until this process ends
            raise OSError(f"somebody else has locked the new folder {folder}")
    return folder


class Voice:
    """Sends messages to the parent, progress not more often than it can matter. `replies`: what it sends back."""

    def __init__(self, out: BinaryIO, replies: BinaryIO) -> None:
        self._out, self.replies = out, replies
        self._reported = 0.0
        self._lock = threading.Lock()

    def say(self, kind: str, **members: Any) -> None:
        line = json.dumps({"kind": kind, **members}).encode() + b"\n"
        with self._lock:  # a stage may ask its teacher from several threads
            self._out.write(line)

    def report(self, step: int, total: int, **metrics: float) -> None:
        if metrics or time.monotonic() - self._reported > _REPORT_PAUSE_S:
            self._reported = time.monotonic()
            self.say("moved", step=step, total=total, metrics=metrics)


def run(claim: Mapping[str, Any], settings: Settings, blobs: BlobStore, voice: Voice, work: Path) -> None:
    """Compute one shard in a folder below `work`, and say how it ended."""
    folder = work / claim["shard_id"]
    try:
        folder.mkdir()
        output = _computed(claim, settings, blobs, voice, folder)
        files = _stored(blobs, output)
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        voice.say("done", files=files, bytes=size, facts=_facts(output))
    except ModelsError as error:
        after_s = (isinstance(error, TryAgain) and error.after) or 0.0
        voice.say(
            "failed",
            code=error.code,
            detail=error.detail,
            hint=error.hint,
            retryable=error.retryable,
            after_s=after_s,
        )
    except MemoryError:
        hint = "Try a smaller batch_size, student or teacher."
        voice.say(
            "failed", code="out_of_memory", detail="The stage ran out of memory.", hint=hint, retryable=False
        )
    except Exception as error:
        print(f"job {claim['job_id']}, stage {claim['stage']}:", file=sys.stderr)
        traceback.print_exc()
        voice.say("failed", **_unforeseen(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _computed(
    claim: Mapping[str, Any], settings: Settings, blobs: BlobStore, voice: Voice, folder: Path
) -> Path:
    method = METHODS[claim["method"]]
    stage = method.stage(claim["stage"])
    context = StageContext(
        inputs={
            name: tuple(
                _fetched(blobs, files, folder / "inputs" / name / str(index))
                for index, files in enumerate(claim["inputs"][name])
            )
            for name in inputs_of(stage, claim["inputs"])
        },
        output=folder / "output",
        shape=JobShape(**claim["shape"]),
        seed=claim["seed"],
        device=str(runtime.resolve_device(settings.device)),
        report=voice.report,
        checkpoints=BlobCheckpoints(
            blobs, voice, folder / "checkpoints", claim["checkpoint"], settings.checkpoint_s
        ),
        shard=claim["shard"],
        shards=claim["shards"],
    )
    context.output.mkdir()
    if "generator" not in context.inputs:
        generators.release()  # the networks of this stage may need the memory
    with _asking(claim, settings, voice) if stage.asks else nullcontext() as access:
        stage.run(replace(context, access=access), method.stage_params(stage, claim["params"]))
    return context.output


@contextmanager
def _asking(claim: Mapping[str, Any], settings: Settings, voice: Voice) -> Iterator[TeacherAccess]:
    """What a stage needs that asks the teacher: the parent's ledger, the way out, the secret headers."""
    with closing(Egress(settings.egress_allow)) as egress:
        yield TeacherAccess(PipeLedger(voice.say, voice.replies), egress, claim["headers"])


class BlobCheckpoints:
    """Checkpoints as blobs, so that another machine can go on from them.

    Each is one file that is like no other, whatever it holds: so nobody else names its blob, and the parent deletes it
    as soon as two newer ones are there.
    """

    def __init__(
        self, blobs: BlobStore, voice: Voice, folder: Path, newest: Mapping[str, Any] | None, pause_s: float
    ) -> None:
        self._blobs, self._voice, self._folder, self._newest = blobs, voice, folder, newest
        self._pause_s, self._saved = pause_s, time.monotonic()

    def latest(self) -> Path | None:
        """The newest checkpoint whose blob is there and whole, else the one before it."""
        kept = self._newest
        while kept:
            folder = self._folder / f"step-{kept['step']}"
            try:
                _unpack(_fetched(self._blobs, kept["files"], folder, verify=True) / _PACK)
                return folder
            except OSError as error:
                print(f"checkpoint at step {kept['step']} is unusable: {error}", file=sys.stderr)
                kept = kept.get("previous")
        return None

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self._pause_s

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(prefix="saving-", dir=self._folder.parent) as folder:
            content, packed = Path(folder, "content"), Path(folder, "packed")
            content.mkdir()
            packed.mkdir()
            write(content)
            _pack(content, packed / _PACK)
            files = _stored(self._blobs, packed)
        self._voice.say("kept", step=step, files=files)
        previous = self._newest and {name: self._newest[name] for name in ("step", "files")}
        self._newest = {"step": step, "files": files, "previous": previous}
        self._saved = time.monotonic()


_PACK = "checkpoint.tar"


def _pack(folder: Path, path: Path) -> None:
    """Write the folder's content as a tar file whose header makes it unlike any other."""
    with tarfile.open(path, "w", pax_headers={"comment": uuid.uuid4().hex}) as pack:
        pack.add(folder, arcname=".")


def _unpack(path: Path) -> None:
    """Unfold a tar file where it lies, in its place."""
    with tarfile.open(path) as pack:
        pack.extractall(path.parent, filter="data")
    path.unlink()


def _fetched(blobs: BlobStore, files: Mapping[str, str], folder: Path, *, verify: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        blobs.fetch(digest, path)
        if verify and storage.digest_of(path) != digest:
            raise OSError(f"blob {digest} of '{name}' is damaged")
    return folder


def _stored(blobs: BlobStore, folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): blobs.put(path) for path in paths}


def _facts(output: Path) -> dict[str, Any] | None:
    """What the student's row shows, from the report in the bundle."""
    path = output / "report.json"
    if not (path.exists() and (output / "bundle.zip").exists()):
        return None
    report = json.loads(path.read_text())
    return {"classes": report["classes"], "summary": report["summary"]}


def _unforeseen(error: Exception) -> dict[str, Any]:
    # Libraries that write files by themselves wrap the system's error, and keep its words.
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or os.strerror(errno.ENOSPC) in str(error):
        detail = "The worker's disk or the blob store is full."
        return {
            "code": "disk_full",
            "detail": detail,
            "hint": "Free space, then retry the job.",
            "retryable": True,
        }
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        detail = "The stage ran out of GPU memory."
        hint = "Try a smaller batch_size, student or teacher."
        return {"code": "out_of_memory", "detail": detail, "hint": hint, "retryable": False}
    detail = (
        f"The stage failed unexpectedly ({kind}). The worker's log has the traceback under this job's id."
    )
    return {"code": "internal_error", "detail": detail, "hint": "", "retryable": False}


if __name__ == "__main__":
    main()
