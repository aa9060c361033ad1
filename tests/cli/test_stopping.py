"""What `stop` says will happen, and what a driver makes of a request in its output."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Unfenced

from gaudi_batch.cli.stopping import ask_to_stop, outlook
from gaudi_batch.cluster.submission import SUBMISSION_VARIABLE, Submitted
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver import stop_watch
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.driver.stop_watch import watched_for_stop
from gaudi_batch.errors import InputError
from gaudi_batch.job import resolve
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.stop_request import requested_grace
from gaudi_batch.storage.store import Storage


@pytest.fixture
def output(write_prompts: Callable[..., Path], tmp_path: Path) -> Path:
    """Of a run that has just begun: 32 batches of 8 a shard, at 0.885 s a batch."""
    prompts = str(write_prompts({"prompt": ["a"] * 512}))
    config = JobConfig(prompts=prompts, output=f"{tmp_path}/out", device="simulated", shard_size=256)
    begin_run(Ledger(Storage(config.output), Unfenced()), resolve(config), 1)
    return tmp_path / "out"


def submitted(output: Path | str, grace: float = 30.0) -> Submitted:
    """As the cluster has kept it."""
    kept = Submitted.read(Submitted("mark", str(output), {}, grace).metadata())
    assert kept is not None
    return kept


def test_a_stop_says_what_will_happen_by_the_job_s_own_rate(output: Path) -> None:
    assert outlook(submitted(output), 30) == (
        "what has begun is committed first, for up to 30 s; a shard takes 28 s, so all of it will be"
    )
    assert outlook(submitted(output), 5) == (
        "what has begun is committed first, for up to 5 s; a shard takes 28 s; what is not done by then is made again"
        " when the job is resumed; with `stop --grace 29` nothing is"
    )


def test_a_stop_says_what_will_happen_by_the_rate_of_the_cards(output: Path) -> None:
    cards = {f"vm-{n}": {"state": "ready", "images": 9, "images_per_s": 0.9, "faults": 0} for n in range(2)}
    (output / "progress.json").write_text(json.dumps({"cards": cards, "images_per_s": 1.8}))
    assert "a shard takes 4 min 44 s; " in outlook(submitted(output), 30)
    assert "with `stop --grace 285` nothing is" in outlook(submitted(output), 30)


def test_a_stop_that_can_t_see_the_output_says_so(tmp_path: Path) -> None:
    elsewhere = submitted(tmp_path / "elsewhere")
    assert "how long a shard takes is not known from here" in outlook(elsewhere, 30)
    with pytest.raises(InputError, match=r"--grace goes by the job's output.*the job's own grace of 30 s holds"):
        ask_to_stop(elsewhere, 60)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("metadata", [None, {}, {"gaudi_batch": "mark"}, {"storage_options": "no json"}])
def test_a_job_of_an_older_version_is_known_for_one(metadata: dict[str, str] | None) -> None:
    assert Submitted.read(metadata) is None


def test_a_request_stops_its_own_submission_alone_and_is_removed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_watch, "STOP_INTERVAL_S", 0.05)
    monkeypatch.setenv(SUBMISSION_VARIABLE, "mark")
    asked, graces = threading.Event(), list[float]()

    def stop(grace: float) -> None:
        graces.append(grace)
        asked.set()

    request = output / "stop.json"
    with watched_for_stop(Storage(str(output)), stop):
        for other in ('{"submission": "other", "grace": 1}', "[]", '{"submission": "mark", "grace": -1}', "torn"):
            request.write_text(other)
            assert not asked.wait(0.2)
        ask_to_stop(submitted(output), 7.0)
        assert asked.wait(20)
        while request.exists():
            asked.wait(0.01)
    assert graces == [7.0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[",
        b"[]",
        b'{"submission": "a"}',
        b'{"submission": "a", "grace": 1e999}',
        b'{"submission": "a", "grace": -1}',
        b'{"submission": "a", "grace": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_request_that_is_none_stops_nobody(data: bytes) -> None:
    assert requested_grace(data, "a") is None
