"""One root on any store: puts are whole, failures are tried again, secrets stay inside. Local disk and a real S3."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fsspec.registry import _registry
from helpers import S3Server, StoreServer

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.storage import retry
from gaudi_batch.storage.store import Storage


@pytest.fixture(params=["local", "s3", "gcs", "azure"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "root"))
    server: StoreServer = request.getfixturevalue(request.param)
    return Storage(server.url(tmp_path.name), server.options, retry_timeout_s=20)


def test_what_is_put_is_read_listed_and_removed(storage: Storage) -> None:
    storage.put("a/b/one.bin", b"first")
    storage.put("a/b/one.bin", b"second")
    storage.put("a/two.bin", b"")
    assert storage.get("a/b/one.bin") == b"second"
    assert storage.get("a/none") is None
    assert storage.names("a") == ["b", "two.bin"]
    assert storage.names("nowhere") == []
    assert storage.get_range("a/b/one.bin", 1, 4) == b"eco"
    storage.remove("a/b")
    storage.remove("a/b")
    assert storage.names("a") == ["two.bin"]
    storage.put("a/b/one.bin", b"again")
    assert storage.get("a/b/one.bin") == b"again"


def test_a_directory_in_which_a_file_vanishes_is_removed_with_all_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a card renames what it has just written."""
    storage = Storage(str(tmp_path / "root"))
    for number in range(5):
        storage.put(f"a/{number}.png", b"x")
    (tmp_path / "root/a/.9.png.part-1").write_bytes(b"x")
    unlink = os.unlink

    def after_its_writer(path: Any, **where: Any) -> None:
        if ".part-" in str(path):
            unlink(path, **where)
        unlink(path, **where)

    monkeypatch.setattr(os, "unlink", after_its_writer)
    storage.remove("a")
    assert not (tmp_path / "root/a").exists()


def test_nothing_asks_for_a_working_directory_that_is_gone(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a job whose package Ray removes while it runs."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    storage.retry_timeout_s = 0.0
    storage.put("images/000000-abcde1/1.png", b"x")
    storage.put("images/000000-abcde1/2.png", b"x")
    storage.remove("images/000000-abcde1/2.png")
    assert storage.names("images/000000-abcde1") == ["1.png"]
    assert storage.get("images/000000-abcde1/1.png") == b"x"
    storage.remove("images/000000-abcde1")
    assert storage.names("images") == []


def test_a_file_is_read_at_any_position(storage: Storage) -> None:
    storage.put("f", bytes(range(100)))
    with storage.open("f") as file:
        file.seek(-10, 2)
        assert file.read(4) == bytes(range(90, 94))
        file.seek(5)
        assert file.read() == bytes(range(5, 100))
        assert file.read(1) == b""


def test_a_storage_can_be_sent_to_a_card(storage: Storage) -> None:
    storage.put("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).get("x") == b"1"


def test_a_local_file_is_put_whole(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"z" * 3_000_000)
    storage.put_file("big", str(tmp_path / "big"))
    assert storage.get("big") == b"z" * 3_000_000


def test_a_write_that_may_not_go_on_any_more_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="came too late"):
        Storage(str(tmp_path), retry_timeout_s=0.1).put("x", b"1", keep=lambda: False)
    assert list(tmp_path.iterdir()) == []


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def operation() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return operation


def test_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)
    storage = Storage(str(tmp_path))
    assert storage.with_retries("try", failing(4, OSError(errno.EIO, "slow down"))) == "done"
    assert storage.with_retries("try", failing(2, TimeoutError())) == "done"
    assert storage.with_retries("try", failing(2, ConnectionResetError())) == "done"
    assert storage.longest_running_s() == 0


@pytest.mark.parametrize(
    "error",
    [PermissionError("no"), OSError(errno.ENOSPC, "No space left on device"), FileNotFoundError("no such bucket")],
)
def test_what_can_not_pass_is_raised_at_once(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError, match="can't write x"):
        Storage(str(tmp_path), retry_timeout_s=3600).with_retries("write x", failing(1, error))


def test_what_is_tried_for_long_is_said_and_more_rarely_the_longer_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("gaudi_batch"), "propagate", True)
    own = threading.local()  # threads of other tests may still be trying something
    own.now = 0.0

    def monotonic() -> float:
        return own.now if hasattr(own, "now") else time.monotonic()

    def sleep(seconds: float) -> None:
        if hasattr(own, "now"):
            own.now += seconds
        else:
            time.sleep(seconds)

    monkeypatch.setattr("gaudi_batch.storage.retrying.time", SimpleNamespace(monotonic=monotonic, sleep=sleep))
    with pytest.raises(StorageError, match="tried for"):
        Storage(str(tmp_path), retry_timeout_s=3600).with_retries("read x", failing(10**6, OSError("503")))
    words = r"can't read x, tried for (\d+) s of 3600 s \(storage_patience\): OSError: 503"
    lines = [line for line in caplog.messages if "can't read x" in line]  # threads of other tests may say something
    seconds = [int(number) for line in lines for number in re.findall(words, line)]
    assert len(seconds) == len(lines)
    assert 10 <= seconds[0] <= 30
    assert 4 <= len(seconds) <= 8
    assert all(later >= 2 * before - 1 for before, later in itertools.pairwise(seconds))


def test_trying_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.01)
    with pytest.raises(StorageError, match=r"tried for .* s \(storage_patience\): OSError: 503"):
        Storage(str(tmp_path), retry_timeout_s=0.1).with_retries("read x", failing(10**6, OSError("503")))


def test_secrets_are_not_in_errors(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path), {"secret": "hunter2-hunter2"})
    with pytest.raises(StorageError) as caught:
        storage.with_retries(
            "read", failing(1, PermissionError("denied for hunter2-hunter2 at http://u:p@host/?sig=1"))
        )
    assert not any(secret in str(caught.value) for secret in ("hunter2", "u:p@", "sig=1"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nope://x/y", "mount what is behind nope:// on every node"),
        ("memory://x", "lives in one process"),
        ("sftp://host/x", "mount what is"),
        ("webhdfs://host/x", "mount what is"),
        ("http://host/x", "mount what is"),
        ("simplecache::sftp://host/x", "chained"),
        ("filecache::smb://host/x", "chained"),
        ("simplecache::s3://bucket/x", "chained"),
        ("gs://b/x", r"gaudi-batch\[gcs\]"),
    ],
)
def test_a_url_that_can_not_be_opened_is_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(InputError, match=message):
        Storage(url)


def test_wrong_credentials_are_the_stores_own_words(s3: S3Server) -> None:
    storage = Storage("s3://bucket/x", s3.options | {"secret": "wrong-password"}, retry_timeout_s=5)
    with pytest.raises(StorageError) as caught:
        storage.put("a", b"1")
    assert "wrong-password" not in str(caught.value)
    assert "signature" in str(caught.value).lower()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("webhdfs://host/x.parquet", "mount what is"),
        ("filecache::sftp://host/x.parquet", "chained"),
        ("zip://*.parquet::s3://bucket/x.zip", "chained"),
    ],
)
def test_prompts_that_can_not_be_opened_are_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Storage(url, read_only=True)


def test_prompts_are_read_where_nothing_can_be_written() -> None:
    for url in ("http://host/x.parquet", "https://host/x.parquet"):
        assert Storage(url, read_only=True).root == url
    assert Storage("hf://datasets/me/prompts", read_only=True).filesystem.protocol == "hf"
