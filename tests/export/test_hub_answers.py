"""What the hub answers during a push: what passes is tried again, and what stays ends the push in one line."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from gaudi_batch.errors import GaudiBatchError, InputError, StorageError
from gaudi_batch.export import hub
from gaudi_batch.export.export import RETRY_TIMEOUT_S

REPOSITORY = "owner/name"


def answer(status: int, words: str | None = None) -> Exception:
    """The error of an answer."""
    response = requests.Response()
    response.status_code = status
    told = f"{status} Client Error\n\nsome lines\nof it"
    error: Exception = HfHubHTTPError(told, response=response, server_message=words)
    return error


def not_located(cause: Exception | None) -> Exception:
    """The error of a download whose file huggingface_hub could not ask for."""
    error: Exception = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = cause
    return error


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "delays", lambda: itertools.repeat(0.0))
    monkeypatch.setattr(hub, "WAIT_S", 0.01)


def raising(*errors: Exception) -> Callable[[], None]:
    """An upload that ends with these errors, one each time, and then well."""
    remaining = iter(errors)

    def upload() -> None:
        for error in remaining:
            raise error

    return upload


@pytest.mark.parametrize(
    "error",
    [
        answer(500),
        answer(502),
        answer(429),
        requests.ConnectionError("reset"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        requests.JSONDecodeError("not JSON", "<html>", 0),
        TimeoutError(),
        not_located(None),
        not_located(answer(429)),
        not_located(answer(503)),
        not_located(requests.ConnectionError("reset")),
    ],
)
def test_an_upload_that_ends_with_what_passes_is_tried_again(tmp_path: Path, error: Exception) -> None:
    hub.upload_until_done(raising(error, error), REPOSITORY, tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (answer(401), InputError, "the hub refuses: 401"),
        (answer(403), InputError, "the hub refuses: 403"),
        (answer(404), InputError, "the hub refuses: 404"),
        (not_located(answer(403)), InputError, "the hub refuses: 403"),
        (HFValidationError("a name"), InputError, "the hub refuses: a name"),
        (requests.exceptions.MissingSchema("No scheme supplied"), InputError, "the hub refuses: No scheme"),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), StorageError, "can't be reached: HF_HUB_OFFLINE"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "No space left on device; make room"),
    ],
)
def test_an_upload_that_ends_with_what_stays_is_told_in_a_line(
    tmp_path: Path, error: Exception, kind: type[GaudiBatchError], told: str
) -> None:
    with pytest.raises(kind) as raised:
        hub.upload_until_done(raising(error), REPOSITORY, tmp_path)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_hub_that_goes_on_failing_ends_the_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_TIMEOUT_S", 0.0)
    with pytest.raises(StorageError, match=r"'owner/name': the hub can't be reached: 502"):
        hub.upload_until_done(raising(*[answer(502)] * 3), REPOSITORY, tmp_path)


def test_time_that_an_upload_took_before_it_failed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock: Any = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)
    monkeypatch.setattr(hub, "time", clock)
    upload = raising(answer(502))

    def late() -> None:
        now[0] += 2 * RETRY_TIMEOUT_S
        upload()

    hub.upload_until_done(late, REPOSITORY, tmp_path)


@pytest.mark.parametrize("comes_further", [True, False])
def test_an_upload_that_fails_twice_is_over_unless_it_came_further_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_further: bool
) -> None:
    now, calls = [0.0], itertools.count()
    clock: Any = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None)
    monkeypatch.setattr(hub, "time", clock)
    upload = raising(answer(502), answer(502))

    def slow() -> None:
        if comes_further:
            (tmp_path / f"{next(calls)}.metadata").touch()
        now[0] += 2 * RETRY_TIMEOUT_S
        upload()

    with contextlib.nullcontext() if comes_further else pytest.raises(StorageError, match="can't be reached: 502"):
        hub.upload_until_done(slow, REPOSITORY, tmp_path)


@pytest.mark.parametrize(
    ("logged", "kind", "told"),
    [
        ("Failed to commit: 403 Forbidden: no access", InputError, "the hub refuses: Failed to commit: 403"),
        ("Failed to compute sha256: [Errno 28] No space left", StorageError, "make room"),
    ],
)
def test_what_an_upload_logs_and_would_try_for_ever_ends_it(
    tmp_path: Path, logged: str, kind: type[GaudiBatchError], told: str
) -> None:
    over = threading.Event()

    def upload() -> None:
        logging.getLogger("huggingface_hub").error(logged)
        over.wait(30)

    with pytest.raises(kind) as raised:
        hub.upload_until_done(upload, REPOSITORY, tmp_path)
    over.set()
    assert told in str(raised.value)


def failing_to_put(over: threading.Event, cause: Exception) -> None:
    """An upload as huggingface_hub's, whose large file a store does not take."""
    try:
        raise RuntimeError("Error while uploading 'data/x' to the Hub.") from cause
    except RuntimeError as error:
        logging.getLogger("huggingface_hub").error("Failed to preupload LFS: %s", error)
    over.wait(30)


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (answer(403, "AccessDenied: the bucket is closed"), "to the Hub: 403 AccessDenied: the bucket is closed"),
        (answer(403), "to the Hub: 403 Client Error some lines of it"),
        (requests.ConnectionError("reset by peer"), "to the Hub: reset by peer"),
    ],
)
def test_the_end_says_what_a_store_behind_the_hub_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, told: str
) -> None:
    monkeypatch.setattr(hub, "RETRY_TIMEOUT_S", 0.0)
    over = threading.Event()
    with pytest.raises(StorageError) as raised:
        hub.upload_until_done(lambda: failing_to_put(over, cause), REPOSITORY, tmp_path)
    over.set()
    assert f"'data/x' {told}; the same command goes on" in str(raised.value)


def test_a_store_behind_the_hub_that_refuses_is_asked_again(tmp_path: Path) -> None:
    # The URL that the hub gave may have run out; it gives another.
    over = threading.Event()
    timer = threading.Timer(0.1, over.set)
    timer.start()
    hub.upload_until_done(lambda: failing_to_put(over, answer(403)), REPOSITORY, tmp_path)
    timer.join()


def test_a_refusal_counts_though_a_warning_follows_it(tmp_path: Path) -> None:
    over = threading.Event()

    def upload() -> None:
        logger = logging.getLogger("huggingface_hub")
        logger.error("Failed to commit: 403 Forbidden: no access")
        logger.warning("Failed to commit 5 files at once. Will retry with less files in next batch.")
        over.wait(30)

    with pytest.raises(InputError, match="no access"):
        hub.upload_until_done(upload, REPOSITORY, tmp_path)
    over.set()


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a hub that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers_a_request_has_failed_it(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = type(get_session().get_adapter(silent))
    monkeypatch.setattr(hub, "ANSWER_TIMEOUT_S", 0.05)
    hub.set_timeouts()
    with pytest.raises(requests.Timeout):
        get_session().post(f"{silent}/api/datasets/owner/name/preupload/main", json={})
    monkeypatch.setattr(hub, "ANSWER_TIMEOUT_S", 600.0)
    with pytest.raises(requests.Timeout):
        get_session().get(silent, timeout=0.05)
    assert type(get_session().get_adapter(silent)) is adapter


def test_failing_begins_with_the_first_request_that_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "huggingface_hub")  # which a process that loads a pipeline lifts
    now, over = [1000.0], threading.Event()
    clock: Any = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(hub, "time", clock)

    def upload() -> None:
        logger = logging.getLogger("huggingface_hub.utils._http")
        logger.warning("'Read timed out. (read timeout=120)' thrown while requesting PUT http://store/x?signature=1")
        now[0] += RETRY_TIMEOUT_S + 1
        logger.error("Failed to preupload LFS: Error while uploading 'data/x' to the Hub.")
        over.wait(30)

    with pytest.raises(StorageError, match="Failed to preupload LFS"):
        hub.upload_until_done(upload, REPOSITORY, tmp_path)
    over.set()


def test_an_upload_that_goes_well_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []
    waits: list[float | None] = []
    over = threading.Event()
    monkeypatch.setattr(hub, "_noted", looks.append)
    join = threading.Thread.join

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        waits.append(timeout)
        if len(waits) > 5:
            over.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)

    def upload() -> None:
        over.wait(30)

    hub.upload_until_done(upload, REPOSITORY, tmp_path)
    assert len(waits) > 5
    assert not looks


def test_looking_how_far_an_upload_has_come_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks, notes = [0.0], [], {("a", 1)}

    def noted(_: Path) -> set[tuple[str, int]]:
        now[0] += 0.4
        looks.append(now[0])
        return set(notes)

    clock: Any = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(hub, "time", clock)
    monkeypatch.setattr(hub, "_noted", noted)
    progress = hub.Progress(tmp_path)
    assert not progress.was_made(at_once=False)
    while now[0] < 100:
        now[0] += 0.2
        assert not progress.was_made(at_once=False)
    assert 0.4 * len(looks) < 5
    notes.add(("b", 2))
    now[0] += 15
    assert progress.was_made(at_once=False)


def test_what_huggingface_hub_notes_is_progress(tmp_path: Path) -> None:
    progress = hub.Progress(tmp_path)
    assert not progress.was_made(at_once=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.parquet.metadata").touch()
    assert progress.was_made(at_once=True)
    assert not progress.was_made(at_once=True)
