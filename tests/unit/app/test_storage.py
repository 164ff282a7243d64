"""Blobs on a folder and on an fsspec file system: whole or absent, also after errors, kills and races."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app import ids, storage
from app.storage import YOUNG_S, BlobStore, LocalStore, RemoteStore

CONTENT = b"what is kept" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ABSENT = hashlib.sha256(b"").hexdigest()


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "blobs")


@pytest.fixture
def remote() -> Iterator[RemoteStore]:
    store = RemoteStore(f"memory://{ids.new('bucket')}/blobs", {})
    yield store
    store.files.store.clear()


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest) -> BlobStore:
    made: BlobStore = request.getfixturevalue(request.param)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def grow_old(store: BlobStore, digest: str, seconds: float) -> None:
    """As if the blob had been stored so long ago."""
    if isinstance(store, LocalStore):
        then = time.time() - seconds
        os.utime(store.path(digest), (then, then))
    else:
        assert isinstance(store, RemoteStore)
        store.files.store[store.path(digest)].modified = datetime.now(UTC) - timedelta(seconds=seconds)


def temporary_files(store: LocalStore) -> list[Path]:
    return list((store.root / "tmp").iterdir())


def all_files(store: LocalStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


def test_a_blob_is_named_by_its_digest_and_read_back_whole(
    store: BlobStore, source: Path, tmp_path: Path
) -> None:
    assert store.put(source) == DIGEST == storage.digest_of(source)
    assert store.exists(DIGEST)
    assert store.size(DIGEST) == len(CONTENT)
    store.fetch(DIGEST, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == CONTENT
    with store.open(DIGEST) as reader:
        reader.seek(5)
        assert reader.read(7) == CONTENT[5:12]


def test_the_same_content_is_stored_once(store: BlobStore, source: Path) -> None:
    assert store.put(source) == store.put(source) == DIGEST
    assert list(store.older_than(-1)) == [DIGEST]
    if isinstance(store, LocalStore):
        assert all_files(store) == [store.path(DIGEST)]


def test_the_source_stays_as_it_was(store: BlobStore, source: Path) -> None:
    before = source.stat().st_mode
    store.put(source)
    assert (source.read_bytes(), source.stat().st_mode) == (CONTENT, before)


def test_an_empty_file_is_a_blob_too(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert store.put(tmp_path / "empty") == ABSENT
    store.fetch(ABSENT, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b""


@pytest.mark.parametrize("ask", ["fetch", "open", "size"])
def test_an_absent_blob_is_not_found_and_nothing_is_left(ask: str, store: BlobStore, tmp_path: Path) -> None:
    asked: dict[str, Callable[[], Any]] = {
        "fetch": lambda: store.fetch(ABSENT, tmp_path / "fetched"),
        "open": lambda: store.open(ABSENT),
        "size": lambda: store.size(ABSENT),
    }
    with pytest.raises(FileNotFoundError):
        asked[ask]()
    assert not store.exists(ABSENT)
    assert list(tmp_path.glob("fetched*")) == []


def test_a_fetched_blob_is_read_only(store: BlobStore, source: Path, tmp_path: Path) -> None:
    store.put(source)
    store.fetch(DIGEST, tmp_path / "fetched")
    assert (tmp_path / "fetched").stat().st_mode & 0o777 == 0o444


def test_a_fetched_blob_outlives_its_deletion(store: BlobStore, source: Path, tmp_path: Path) -> None:
    store.put(source)
    store.fetch(DIGEST, tmp_path / "fetched")
    store.delete(DIGEST)
    assert not store.exists(DIGEST)
    assert (tmp_path / "fetched").read_bytes() == CONTENT


def test_deleting_what_is_gone_does_no_harm(store: BlobStore, source: Path) -> None:
    store.put(source)
    store.delete(DIGEST)
    store.delete(DIGEST)
    assert list(store.older_than(-1)) == []


def test_local_blobs_are_read_only_files_shared_by_links(
    local: LocalStore, source: Path, tmp_path: Path
) -> None:
    local.put(source)
    local.fetch(DIGEST, tmp_path / "fetched")
    assert local.path(DIGEST).stat().st_mode & 0o777 == 0o444
    assert local.path(DIGEST).samefile(tmp_path / "fetched")


def test_a_local_blob_is_copied_where_links_are_impossible(
    local: LocalStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    local.put(source)
    monkeypatch.setattr(os, "link", refuse)
    local.fetch(DIGEST, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == CONTENT
    assert (tmp_path / "fetched").stat().st_mode & 0o777 == 0o444
    assert not local.path(DIGEST).samefile(tmp_path / "fetched")


def test_a_damaged_remote_blob_is_refused_and_not_left_behind(
    remote: RemoteStore, source: Path, tmp_path: Path
) -> None:
    remote.put(source)
    remote.files.pipe_file(remote.path(DIGEST), CONTENT[:-1] + b"!")
    with pytest.raises(OSError, match=f"blob {DIGEST} is damaged in the store"):
        remote.fetch(DIGEST, tmp_path / "fetched")
    assert list(tmp_path.glob("fetched*")) == []


def test_a_fetch_that_breaks_off_leaves_nothing(
    remote: RemoteStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(remote_path: str, path: str) -> None:
        Path(path).write_bytes(CONTENT[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    remote.put(source)
    monkeypatch.setattr(remote.files, "get_file", break_off)
    with pytest.raises(OSError, match="No space left"):
        remote.fetch(DIGEST, tmp_path / "fetched")
    assert list(tmp_path.glob("fetched*")) == []


def test_a_full_disk_while_a_blob_is_copied_leaves_nothing(
    local: LocalStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            local.put(source)
    assert all_files(local) == []
    assert local.put(source) == DIGEST


KILLED = """
import os, signal, sys
from pathlib import Path
from app import storage
store = storage.LocalStore(Path(sys.argv[1]))
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
store.put(Path(sys.argv[2]))
"""


def test_what_a_killed_process_left_is_no_blob_and_goes_after_a_day(local: LocalStore, source: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, local.root, source], cwd=Path(__file__).parents[3], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = temporary_files(local)
    assert left.read_bytes() == CONTENT
    assert not local.exists(DIGEST)
    assert list(local.older_than(-1)) == []
    local.tidy()
    assert temporary_files(local) == [left]  # a living process may be writing it
    os.utime(left, (time.time() - YOUNG_S - 60,) * 2)
    local.tidy()
    assert temporary_files(local) == []


def test_threads_that_store_the_same_content_at_once_make_one_blob(store: BlobStore, source: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(store.put, [source] * 40))
    assert set(digests) == {DIGEST}
    assert list(store.older_than(-1)) == [DIGEST]
    with store.open(DIGEST) as reader:
        assert reader.read() == CONTENT
    if isinstance(store, LocalStore):
        assert all_files(store) == [store.path(DIGEST)]


def test_only_blobs_that_were_stored_longer_ago_are_old(store: BlobStore, tmp_path: Path) -> None:
    digests = {}
    for name, age in (("young", 0.0), ("middle", 500.0), ("old", 5000.0)):
        (tmp_path / name).write_text(name)
        digests[name] = store.put(tmp_path / name)
        grow_old(store, digests[name], age)
    store.check()  # whatever it writes is no blob
    assert set(store.older_than(1000)) == {digests["old"]}
    assert set(store.older_than(100)) == {digests["old"], digests["middle"]}


@pytest.mark.parametrize("again", ["put", "keep"])
def test_an_old_blob_that_is_used_again_is_young_and_not_forgotten(
    again: str, store: BlobStore, source: Path
) -> None:
    store.put(source)
    grow_old(store, DIGEST, 2 * YOUNG_S)
    assert list(store.older_than(YOUNG_S)) == [DIGEST]
    if again == "put" or not store.keep(DIGEST):
        store.put(source)
    assert list(store.older_than(YOUNG_S)) == []
    assert not store.forget(DIGEST, YOUNG_S)
    assert store.exists(DIGEST)


def test_a_remote_blob_is_written_anew_before_it_can_become_old_in_use(
    remote: RemoteStore, source: Path
) -> None:
    remote.put(source)
    grow_old(remote, DIGEST, 0.4 * YOUNG_S)
    assert remote.keep(DIGEST)
    remote.put(source)
    assert list(remote.older_than(0.3 * YOUNG_S)) == [DIGEST]  # young enough: not sent again
    grow_old(remote, DIGEST, 0.6 * YOUNG_S)
    assert not remote.keep(DIGEST)
    remote.put(source)
    assert list(remote.older_than(0.3 * YOUNG_S)) == []


def test_a_blob_that_is_absent_cannot_be_kept(store: BlobStore) -> None:
    assert not store.keep(ABSENT)


def test_an_old_blob_is_forgotten_once(store: BlobStore, source: Path) -> None:
    store.put(source)
    assert not store.forget(DIGEST, YOUNG_S)
    grow_old(store, DIGEST, 2 * YOUNG_S)
    assert store.forget(DIGEST, YOUNG_S)
    assert not store.exists(DIGEST)
    assert not store.forget(DIGEST, YOUNG_S)


def test_a_blob_that_is_stored_while_it_is_being_forgotten_is_there_afterwards(
    local: LocalStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = local.delete

    def delete_late(digest: str) -> None:
        storing.append(pool.submit(local.put, source))
        wait(storing, timeout=0.5)
        delete(digest)

    local.put(source)
    grow_old(local, DIGEST, 2 * YOUNG_S)
    monkeypatch.setattr(local, "delete", delete_late)
    storing: list[Future[str]] = []
    with ThreadPoolExecutor(1) as pool:
        assert local.forget(DIGEST, YOUNG_S)
    assert storing[0].result() == DIGEST
    assert local.exists(DIGEST)


def test_a_listing_bears_that_others_delete_meanwhile(store: BlobStore, tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / "file").write_text(str(index))
        store.put(tmp_path / "file")
    found = store.older_than(-1)
    first = next(found)
    for digest in set(store.older_than(-1)) - {first}:
        store.delete(digest)
    assert list(found) == []


def test_a_remote_store_sees_at_once_what_other_processes_do(remote: RemoteStore) -> None:
    assert remote.files.dircache.use_listings_cache is False


def test_check_says_whether_the_store_can_be_written(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.check()
    if isinstance(store, LocalStore):
        assert temporary_files(store) == []
        (store.root / "tmp").rmdir()
    else:
        assert isinstance(store, RemoteStore)

        def refuse(*_: Any) -> None:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(store.files, "pipe_file", refuse)
    with pytest.raises(OSError, match=r"No such file|Access Denied"):
        store.check()


def test_the_url_says_which_store(tmp_path: Path) -> None:
    local = storage.connect(f"file://{tmp_path / 'blobs'}")
    assert isinstance(local, LocalStore)
    assert local.root == tmp_path / "blobs"
    assert isinstance(storage.connect("memory://blobs"), RemoteStore)
