"""What storage says of a passing trouble, and how long the lease covers what a driver has begun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from gaudi_batch import JobConfig
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.reader import PromptsChanged
from gaudi_batch.dataset.rows import RowRules
from gaudi_batch.output import holder, lease
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.storage.filesystem import open_filesystem
from gaudi_batch.storage.retry import is_permanent
from gaudi_batch.storage.store import Storage

BUCKET = Bucket(64, 64, 20, 7.5)


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [
        (408, "", True),
        (409, "OperationAborted", True),
        (425, "", True),
        (429, "SlowDown", True),
        (400, "RequestTimeout", True),
        (400, "IncompleteBody", True),
        (400, "BadDigest", True),
        (400, "XAmzContentSHA256Mismatch", True),
        (500, "InternalError", True),
        (503, "SlowDown", True),
        (400, "InvalidArgument", False),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
    ],
)
def test_a_refusal_is_final_unless_the_store_says_that_it_passes(status: int, code: str, passes: bool) -> None:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    assert is_permanent(error) is not passes


def test_requests_to_s3_have_time_limits_of_their_own_unless_the_job_sets_them() -> None:
    options = {"key": "k", "secret": "s", "config_kwargs": {"read_timeout": 7}}
    config = open_filesystem("s3://bucket/x", options)[0].config_kwargs
    assert (config["connect_timeout"], config["read_timeout"], config["retries"]) == (10, 7, {"max_attempts": 2})


def test_what_a_driver_begins_while_it_is_certain_ends_before_another_may_take_over() -> None:
    assert lease.RENEW_DEADLINE_S + lease.MANIFEST_TIMEOUT_S < holder.LEASE_TTL_S
    assert lease.RENEW_INTERVAL_S < lease.RENEW_DEADLINE_S / 2


def test_a_driver_that_could_not_count_up_for_half_a_minute_holds_nothing(tmp_path: Path) -> None:
    keeper = LeaseKeeper(Storage(str(tmp_path), retry_timeout_s=0.0), "aaaaa")
    keeper.take()
    assert keeper.holds()
    keeper._kept_up = time.monotonic() - 31
    assert not keeper.holds()


@pytest.mark.parametrize("change", ["swapped", "touched"])
def test_a_file_of_the_same_size_that_takes_its_place_while_a_run_goes_on_is_noticed(
    change: str, write_prompts: Callable[..., Path], tmp_path: Path
) -> None:
    """A driver that is started anew knows it by its footer alone."""
    directory = write_prompts({"prompt": ["a", "b", "c"]})
    dataset = open_prompts(JobConfig(prompts=str(directory), output=str(tmp_path / "out"), device="simulated"))
    rules, shard = RowRules(BUCKET, 1, None, 8), Shard(0, 0, 0, 3, BUCKET, 3, 3)
    assert len(dataset.read(shard, rules)[0]) == 3
    file = directory / "part-0.parquet"
    if change == "swapped":
        pq.write_table(pa.table({"prompt": ["x", "y", "z"]}), tmp_path / "other.parquet", row_group_size=1000)
        assert (tmp_path / "other.parquet").stat().st_size == file.stat().st_size
        (tmp_path / "other.parquet").replace(file)
    os.utime(file, (1, 1))
    with pytest.raises(PromptsChanged, match="is not what it was when it was planned"):
        dataset.read(shard, rules)


def test_a_file_that_gives_other_rows_than_were_planned_is_noticed(
    write_prompts: Callable[..., Path], tmp_path: Path
) -> None:
    directory = write_prompts({"prompt": ["a", "b", "c"]})
    dataset = open_prompts(JobConfig(prompts=str(directory), output=str(tmp_path / "out"), device="simulated"))
    with pytest.raises(PromptsChanged):
        dataset.read(Shard(0, 0, 0, 3, BUCKET, 4, 4), RowRules(BUCKET, 1, None, 8))


def test_what_is_hidden_by_its_name_is_no_prompt(tmp_path: Path) -> None:
    """A dot or an underscore says so, of a file or of a directory above it, as Spark has it."""
    for name in ("a.parquet", "_b.parquet", ".c.parquet", "_temporary/d.parquet", ".e/f/g.parquet", "h_/i.parquet"):
        path = tmp_path / "prompts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"prompt": [name]}), path)
    job = JobConfig(prompts=str(tmp_path / "prompts"), output=str(tmp_path / "out"), device="simulated")
    assert [file.name for file in open_prompts(job).files] == ["a.parquet", "h_/i.parquet"]
