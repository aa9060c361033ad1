"""Failed rows run again, and images that are missing or torn made again; nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import read_manifest

from gaudi_batch import JobConfig, RunResult, RunStopped, run
from gaudi_batch.cli import main as cli
from gaudi_batch.dataset.reader import PromptDataset

pytestmark = pytest.mark.usefixtures("thread_cards")

Make = Callable[..., RunResult]


@pytest.fixture
def make(prompts: Path, tmp_path: Path, cluster: str) -> Make:
    """Runs the job of 100 rows with some of them raising."""

    def call(raising: list[int], fields: dict[str, Any] | None = None, **flags: Any) -> RunResult:
        job = JobConfig(
            prompts=str(prompts),
            output=str(tmp_path / "out"),
            device="simulated",
            simulated={"batch_seconds": 0.02, "raise_rows": raising},
            shard_size=16,
            cards=1,
            **(fields or {}),
        )
        return run(job, address=cluster, **flags)

    return call


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def manifests(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "manifest").iterdir())}


def failed(output: Path) -> list[int]:
    rows = read_manifest(output)
    assert sorted(row["row"] for row in rows) == list(range(100)), "a row twice, or none"
    return sorted(row["row"] for row in rows if row["status"] == "failed")


def test_failed_rows_alone_are_run_again(make: Make, output: Path) -> None:
    assert make([5, 40, 41, 99]).exit_code == 3
    before = manifests(output)
    result = make([40], retry_failed=True)
    assert result.exit_code == 3
    assert failed(output) == [40]
    assert (result.summary["rows"], result.summary["failed_rows"], result.summary["images"]) == (100, 1, 99)
    after = manifests(output)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3  # rows of three files
    assert make([], retry_failed=True).exit_code == 0
    assert failed(output) == []
    again = manifests(output)
    assert len(again) == len(after) + 1
    assert make([], retry_failed=True).summary["images"] == 100
    assert manifests(output) == again


def test_the_images_are_those_that_a_run_without_failures_would_have_made(
    make: Make, output: Path, tmp_path: Path
) -> None:
    make([5, 40, 41, 99])
    make([], retry_failed=True)
    ours = {row["row"]: row["sha256"] for row in read_manifest(output)}
    output.rename(tmp_path / "first")
    make([])
    assert {row["row"]: row["sha256"] for row in read_manifest(output)} == ours


def test_rows_to_run_again_do_not_count_as_failed_meanwhile(make: Make, output: Path) -> None:
    make([5, 40, 41, 99])
    assert make([5], {"max_failed": 2}, retry_failed=True).exit_code == 3
    assert failed(output) == [5]


def test_verify_lists_what_is_missing_torn_and_foreign_and_repair_makes_just_those_again(
    make: Make, output: Path
) -> None:
    make([5])
    make([], verify=True)
    before = manifests(output)
    paths = {row["row"]: row for row in read_manifest(output) if row["status"] == "ok"}
    (output / paths[20]["path"]).unlink()
    torn = output / paths[90]["path"]
    torn.write_bytes(torn.read_bytes()[:-7])
    (output / "images/stranger.png").write_bytes(b"who is this")
    with pytest.raises(RunStopped, match=r"missing: 1 image, torn: 1 image; .*--repair"):
        make([], verify=True)
    report = json.loads((output / "verify.json").read_text())
    assert (report["missing"], report["torn"]) == ([paths[20]["path"]], [paths[90]["path"]])
    assert report["foreign"] == ["images/stranger.png"]
    assert report["broken"] == [20, 90]
    kept = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}

    assert make([5], repair=True, verify=True).summary["images"] == 99
    after = manifests(output)
    assert {name: after[name] for name in before} == before
    assert not torn.exists()
    del kept[torn]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len([path for path in (output / "images").rglob("*.png") if path not in kept]) == 2
    report = json.loads((output / "verify.json").read_text())
    assert (report["images"], report["missing"], report["torn"]) == (99, [], [])
    assert report["foreign"] == ["images/stranger.png"]
    hashes = {row["row"]: row["sha256"] for row in read_manifest(output)}
    assert all(hashes[row] == paths[row]["sha256"] for row in paths)


@pytest.mark.thorough
def test_repair_and_retries_go_together_in_any_order(make: Make, output: Path) -> None:
    make([5, 6], {"num_images": 2})
    rows = [row for row in read_manifest(output) if row["row"] == 0]
    (output / rows[1]["path"]).unlink()
    result = make([6], {"num_images": 2}, repair=True, retry_failed=True, verify=True)
    assert counts(result) == (100, 1, 198)
    made = {(row["row"], row["image_index"]): row for row in read_manifest(output)}
    assert len(made) == 199
    assert [made[0, image]["sha256"] for image in (0, 1)] == [row["sha256"] for row in rows]
    assert made[0, 0]["shard"] > rows[0]["shard"]
    (output / made[5, 1]["path"]).unlink()
    result = make([0], {"num_images": 2}, repair=True, verify=True)
    assert counts(result) == (100, 1, 198)
    again = {(row["row"], row["image_index"]): row for row in read_manifest(output)}
    assert again[5, 1]["sha256"] == made[5, 1]["sha256"]
    assert counts(make([], {"num_images": 2}, retry_failed=True, verify=True)) == (100, 0, 200)
    assert make([], {"num_images": 2}, repair=True, verify=True).summary["shards"] == len(manifests(output))


def test_a_repair_whose_row_fails_counts_it_as_failed(make: Make, output: Path) -> None:
    make([])
    (output / next(row["path"] for row in read_manifest(output) if row["row"] == 7)).unlink()
    assert counts(make([7], repair=True)) == (100, 1, 99)
    assert failed(output) == [7]
    assert counts(make([], retry_failed=True, verify=True)) == (100, 0, 100)


def counts(result: RunResult) -> tuple[int, int, int]:
    return result.summary["rows"], result.summary["failed_rows"], result.summary["images"]


def test_a_lost_manifest_leaves_rows_that_were_run_again_to_the_later_shard(make: Make, output: Path) -> None:
    make([5, 6])
    make([6], retry_failed=True)
    rows = {row["row"]: row for row in read_manifest(output)}
    assert rows[5]["shard"] > rows[0]["shard"]
    (output / "manifest" / f"{rows[0]['shard']:06d}.parquet").unlink()
    assert counts(make([], verify=True)) == (100, 1, 99)
    again = {row["row"]: row for row in read_manifest(output)}
    assert again[5] == rows[5]
    assert again[6]["status"] == "failed"
    assert (again[0]["sha256"], again[0]["shard"]) == (rows[0]["sha256"], rows[0]["shard"])
    assert failed(output) == [6]


def test_a_retry_that_was_cut_short_goes_on_with_a_plain_resume(
    make: Make, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make([5, 99])
    monkeypatch.setattr("gaudi_batch.driver.runner._make_missing", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make([], retry_failed=True)
    monkeypatch.undo()
    assert make([]).exit_code == 0
    assert failed(output) == []
    assert len({row["shard"] for row in read_manifest(output)}) == len(list((output / "manifest").iterdir()))


@pytest.mark.processes  # which read rows, as the driver must not
def test_failed_rows_are_run_again_but_those_whose_own_data_is_bad(
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = [None if row in (3, 40) else f"prompt {row}" for row in range(60)]
    job = {
        "prompts": str(write_prompts({"prompt": texts, "width": [65 if row == 8 else 64 for row in range(60)]})),
        "output": str(tmp_path / "out"),
        "device": "simulated",
        "simulated": {"batch_seconds": 0.01, "raise_rows": [5, 41]},
        "cards": 2,
    }
    file = tmp_path / "job.yaml"

    def run(*flags: str) -> tuple[int, dict[int, str]]:
        file.write_text(json.dumps(job))
        code = cli.main(["run", str(file), "--address", cluster, *flags])
        return code, {row["row"]: row["error"] for row in read_manifest(tmp_path / "out") if row["status"] == "failed"}

    code, failed = run()
    assert (code, sorted(failed)) == (3, [3, 5, 8, 40, 41])
    shards = sorted((tmp_path / "out/manifest").iterdir())
    job["simulated"] = {"batch_seconds": 0.01}
    # Of this process alone: the cards read rows.
    monkeypatch.setattr(PromptDataset, "read", lambda *_: pytest.fail("the driver reads rows"))
    capsys.readouterr()
    code, left = run("--retry-failed")
    assert (code, left) == (3, {row: failed[row] for row in (3, 8, 40)})
    log = capsys.readouterr().err
    assert "3 failed rows can't be run whatever is tried" in log
    assert "to run again: 2 failed rows, in 1 new shard" in log
    assert len(list((tmp_path / "out/manifest").iterdir())) == len(shards) + 1
    assert run("--retry-failed") == (3, left)
    assert "no failed row is left to run again" in capsys.readouterr().err
