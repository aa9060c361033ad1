"""A job from prompts to records, on simulated cards of a real Ray cluster."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import read_manifest
from PIL import Image

from gaudi_batch import InputError, JobConfig, RunResult, RunStopped, run
from gaudi_batch.dataset.rows import PromptRow, image_seed
from gaudi_batch.plan import Bucket

pytestmark = pytest.mark.usefixtures("thread_cards")

FAST = {"batch_seconds": 0.01}


def make(prompts: Path, output: Path, cluster: str, **fields: Any) -> RunResult:
    overwrite = bool(fields.pop("overwrite", False))
    fields = {"device": "simulated", "simulated": FAST, "shard_size": 16, "cards": 2} | fields
    return run(JobConfig(prompts=str(prompts), output=str(output), **fields), address=cluster, overwrite=overwrite)


def images_by_row(output: Path) -> dict[tuple[int, int], str]:
    return {(row["row"], row["image_index"]): row["sha256"] for row in read_manifest(output)}


def throughput_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in output.glob("throughput/*/*.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.processes
def test_every_image_is_there_once_and_named_by_the_manifest(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    result = make(prompts, output, cluster)
    rows = read_manifest(output)
    assert result.exit_code == 0
    assert [row["row"] for row in sorted(rows, key=lambda row: row["row"])] == list(range(100))
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        data = (output / row["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert row["prompt"] == f"prompt number {row['row']}"
        assert row["topic"] == f"t{row['row'] % 3}"
    files = {str(path.relative_to(output)) for path in (output / "images").rglob("*") if path.is_file()}
    assert files == {row["path"] for row in rows} | {"images/metadata.parquet"}
    assert json.loads((output / "lease.json").read_text())["released"]


def test_a_relative_output_is_relative_to_the_driver(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("prompts"), Path("here/out"), cluster, limit=9)
    rows = read_manifest(tmp_path / "here/out")
    assert len(rows) == 9
    assert all((tmp_path / "here/out" / row["path"]).is_file() for row in rows)


def test_the_output_may_lie_among_the_prompts(prompts: Path, cluster: str) -> None:
    for _ in range(2):
        assert make(prompts, prompts / "out", cluster, limit=9).exit_code == 0


def test_starting_afresh_removes_a_run_and_nothing_else(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    for path in ("images/holiday/rome.jpg", "manifest/cargo.txt"):
        (output / path).parent.mkdir(parents=True)
        (output / path).write_text("mine")
    make(prompts, output, cluster, limit=9, overwrite=True)
    with pytest.raises(InputError, match="no Ray cluster answers"):
        make(prompts, output, "127.0.0.1:1", limit=9, seed=2, overwrite=True)
    assert (output / "manifest.parquet").exists()
    make(prompts, output, cluster, limit=9, seed=2, overwrite=True)
    assert (output / "images/holiday/rome.jpg").exists()
    assert (output / "manifest/cargo.txt").exists()
    assert len(list(output.glob("images/*/*.png"))) == 9


def test_an_image_that_can_not_be_encoded_fails_its_row_alone(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    widest_webp = 16383
    directory = write_prompts(
        {"prompt": ["p"] * 9, "width": [64] * 4 + [widest_webp + 9] + [64] * 4, "height": [8] * 9}
    )
    result = make(directory, tmp_path / "out", cluster, encoding={"type": "webp"}, batch_size=2, max_pixels=2**22)
    failed = {row["row"]: row["error"] for row in read_manifest(tmp_path / "out") if row["status"] == "failed"}
    assert result.exit_code == 3
    assert list(failed) == [4]
    assert "can't be encoded" in failed[4]


def test_throughput_lines_and_summary_agree_with_the_manifest(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    summary = make(prompts, output, cluster).summary
    lines = throughput_lines(output)
    assert sum(line["images"] for line in lines) == summary["images"] == 100
    assert sum(line["padding"] for line in lines) == summary["padding"]
    per_card = Counter({name: card["images"] for name, card in summary["cards"].items()})
    assert per_card == Counter(row["card"] for row in read_manifest(output))
    assert summary == json.loads((output / "summary.json").read_text())
    assert {(line["node"], line["module"]) for line in lines} <= {
        (card["node"], card["module"]) for card in summary["cards"].values()
    }
    warm = [line for line in lines if line["phase"] == "warmup"]
    assert len(warm) == sum(card["images"] > 0 for card in summary["cards"].values())


def test_every_card_of_the_cluster_works_on_a_module_of_its_own(prompts: Path, tmp_path: Path, cluster: str) -> None:
    summary = make(
        prompts, tmp_path / "out", cluster, simulated={"batch_seconds": 1.0}, num_images=4, shard_size=8, cards="all"
    ).summary
    assert {card["module"] for card in summary["cards"].values()} == {0, 1, 2, 3}
    assert min(card["images"] for card in summary["cards"].values()) > 0


@pytest.mark.processes
def test_the_same_job_gives_the_same_bytes_on_any_number_of_cards(prompts: Path, tmp_path: Path, cluster: str) -> None:
    make(prompts, tmp_path / "a", cluster, num_images=3, cards=1, shard_size=7)
    make(prompts, tmp_path / "b", cluster, num_images=3, cards=4, shard_size=50)
    assert images_by_row(tmp_path / "a") == images_by_row(tmp_path / "b")
    assert len(images_by_row(tmp_path / "a")) == 300


def test_the_same_command_makes_only_what_is_missing(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    before = images_by_row(output)
    kept = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    for number in (1, 3):
        (output / f"manifest/{number:06d}.parquet").unlink()
    (output / "manifest/000002.parquet").write_bytes(b"PAR1 torn in the middle")
    make(prompts, output, cluster, shard_size=999)
    assert images_by_row(output) == before
    again = {row["path"]: row["shard"] for row in read_manifest(output)}
    latest_shard_of_row = {shard for path, shard in again.items() if output / path not in kept}
    assert latest_shard_of_row == {1, 2, 3}
    assert all(
        path.stat().st_mtime_ns == when for path, when in kept.items() if int(path.parent.name[:6]) not in (1, 2, 3)
    )
    stored = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert stored == set(again), "what the lost manifests named is gone"


def test_a_finished_run_is_only_summed_up_again(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    before = {path: path.stat().st_mtime_ns for path in (output / "manifest").iterdir()}
    assert make(prompts, output, "nowhere:1").exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (output / "manifest").iterdir()}


def test_another_job_on_the_output_is_refused_with_what_differs(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    with pytest.raises(InputError, match=r"seed: was 0, is 5; steps: was 50, is 20") as caught:
        make(prompts, output, cluster, seed=5, steps=20)
    assert caught.value.exit_code == 2
    make(prompts, output, cluster, seed=5, steps=20, overwrite=True)
    assert {row["steps"] for row in read_manifest(output)} == {20}
    assert len(list((output / "images").rglob("*.png"))) == 100


def test_a_changed_dataset_is_refused_with_the_file(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    table = pq.read_table(prompts / "part-1.parquet")
    changed = table.set_column(0, "prompt", pa.array(["another"] * len(table)))
    pq.write_table(changed, prompts / "part-1.parquet", row_group_size=20)
    with pytest.raises(InputError, match="part-1"):
        make(prompts, output, cluster)


def test_every_kind_of_bad_row_is_recorded_and_costs_no_other(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    good = {"prompt": "good", "width": 64.0, "guidance_scale": 7.5, "num_images": 1, "seed": 1}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"prompt": None}, "prompt is null"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"width": 0.0}, "width is 0; it must be at least 1"),
        ({"width": 65.0}, "width is 65; this model needs a multiple of 8"),
        ({"width": 64.5}, "width is 64.5; it must be a whole number"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"num_images": 0}, "num_images is 0"),
        ({"seed": -1}, "seed is -1; it must be in 0 .."),
    ]
    rows = [good, *(good | wrong for wrong, _ in bad), good]
    table = pa.Table.from_pylist(rows).append_column("steps", pa.array([None] * 10 + ["many", None], pa.string()))
    expected = [*(reason for _, reason in bad[:9]), "steps is 'many'; it must be a whole number"]
    result = make(write_prompts(table), tmp_path / "out", cluster)
    assert result.exit_code == 3
    by_row = {row["row"]: row for row in read_manifest(tmp_path / "out")}
    assert [by_row[0]["status"], by_row[11]["status"]] == ["ok", "ok"]
    for number, reason in enumerate(expected, 1):
        assert by_row[number]["status"] == "failed"
        assert reason in by_row[number]["error"]
    assert result.summary["failed_rows"] == 10


def test_a_row_asks_for_its_own_shape_seed_and_number(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    count = 40
    table: dict[str, Any] = {
        "id": [f"id-{n // 2}" for n in range(count)],
        "prompt": ["p"] * count,
        "width": [64 if n % 3 else 128 for n in range(count)],
        "num_images": [1 + n % 2 for n in range(count)],
        "seed": [None if n % 4 else 100 + n for n in range(count)],
        "path": ["their own"] * count,
    }
    make(write_prompts(table, row_group_size=7), tmp_path / "out", cluster)
    rows = read_manifest(tmp_path / "out")
    assert len(rows) == 60
    for row in rows:
        number = row["row"]
        assert row["width"] == (64 if number % 3 else 128)
        assert Image.open(tmp_path / "out" / row["path"]).size == (row["width"], 64)
        known = PromptRow(number, row["id"], "p", "", table["seed"][number], Bucket(64, 64, 1, 1.0), 1, None)
        assert row["seed"] == image_seed(0, known, row["image_index"])
        assert row["input_path"] == "their own"
    widths = {(line["shard"], line["bucket"]["width"]) for line in throughput_lines(tmp_path / "out")}
    assert len(widths) == len({shard for shard, _ in widths})


def test_a_row_that_raises_is_recorded_and_its_neighbours_are_made(prompts: Path, tmp_path: Path, cluster: str) -> None:
    result = make(prompts, tmp_path / "out", cluster, simulated=FAST | {"raise_rows": [5, 6, 77]}, num_images=2)
    rows = read_manifest(tmp_path / "out")
    assert {row["row"]: row["error"] for row in rows if row["status"] == "failed"} == {
        number: f"RuntimeError: simulated failure of row {number}" for number in (5, 6, 77)
    }
    assert len([row for row in rows if row["status"] == "ok"]) == 97 * 2
    assert result.exit_code == 3


def test_max_failed_stops_the_run_and_the_same_command_goes_on(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    simulated = FAST | {"raise_rows": list(range(0, 100, 2))}
    with pytest.raises(RunStopped, match="max_failed"):
        make(prompts, output, cluster, simulated=simulated, max_failed=3, cards=1)
    assert json.loads((output / "summary.json").read_text())["state"] == "stopped"
    assert make(prompts, output, cluster, simulated=simulated).exit_code == 3
    assert Counter(row["status"] for row in read_manifest(output)) == {"ok": 50, "failed": 50}


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_images_are_encoded_as_asked(prompts: Path, tmp_path: Path, cluster: str, kind: str, magic: bytes) -> None:
    make(prompts, tmp_path / "out", cluster, encoding={"type": kind, "quality": 80}, limit=9)
    rows = read_manifest(tmp_path / "out")
    assert len(rows) == 9
    assert all((tmp_path / "out" / row["path"]).read_bytes().startswith(magic) for row in rows)
