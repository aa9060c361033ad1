"""What an export has of the rows of a run, and what its card says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from helpers import StoreServer

from gaudi_batch.errors import InputError
from gaudi_batch.export import export
from gaudi_batch.export.card import card
from gaudi_batch.export.export import Export, ExportRequest, plan_export, require_outside
from gaudi_batch.layout import image_path
from gaudi_batch.output import manifest
from gaudi_batch.output.dataset_view import CommittedRun
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.storage.store import Storage

ROWS = 10
FAILED = {4: "boom", 7: "boom", 8: "bang"}
Planned = Callable[..., Export]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Plans an export of a complete run of ten rows with two images each, some of which failed."""
    storage = Storage(str(tmp_path / "out"))
    records: list[dict[str, Any]] = []
    for row in range(ROWS):
        common = {"id": str(row), "row": row, "prompt": "a status symbol" if row == 0 else "p", "exit_status": row % 4}
        if row in FAILED:
            records.append(common | {"status": "failed", "error": FAILED[row]})
            continue
        for number in range(2):
            path = image_path(0, "aaaaa0", row, number, "png")
            storage.put(path, b"image")
            stored = {"image_index": number, "status": "ok", "path": path, "sha256": "0" * 64}
            records.append(common | stored)
    table = pa.Table.from_pylist(records, manifest.schema(pa.schema([("exit_status", pa.int64())])))
    info = RunInfo({"device": "simulated"}, {}, {}, "", ROWS, 2 * ROWS)
    reader: Any = SimpleNamespace(storage=storage)
    run = CommittedRun(reader, info, ds.dataset(table), is_complete=True)
    monkeypatch.setattr(export, "open_committed", lambda *_: run)

    def call(*filters: str, failed: bool = True, **fields: Any) -> Export:
        if not failed:
            kept = table.filter(pa.compute.equal(table["status"], "ok"))
            monkeypatch.setattr(
                export, "open_committed", lambda *_: dataclasses.replace(run, manifest=ds.dataset(kept))
            )
        request = {"output": str(tmp_path / "out"), "target": str(tmp_path / "set")}
        return plan_export(ExportRequest(**(request | fields), filters=filters))

    return call


def described(planned: Export) -> set[str]:
    return set(planned.tasks[0].described.column_names)


def test_the_status_of_rows_is_exported_where_a_filter_names_its_column_and_nowhere_else(planned: Planned) -> None:
    assert {"status", "error"} <= described(planned("status=ok,failed"))
    assert {"status", "error"} <= described(planned("exit_status!=3", " status == ok"))
    for text in ("prompt!=a status symbol", "exit_status!=3"):
        assert not {"status", "error"} & described(planned(text))


def test_the_card_names_filters_and_splits(planned: Planned) -> None:
    text = card(planned("exit_status!=3", "prompt!=`a`\n# [x](y)", split="test=20%"), [])
    assert "Of the run's rows it has those that pass all filters: `exit_status!=3`, `prompt!='a' # [x](y)`." in text
    assert "Splits are by a hash of each row's id: `test=20%`; `train` has what no share takes." in text
    whole, some = "train=80%,test=20%", "train=50%,test=20%"
    assert f"Splits are by a hash of each row's id: `{whole}`." in card(planned(split=whole), [])
    assert f"`{some}`; `train` has what no share takes, too." in card(planned(split=some), [])
    assert "Splits are the values of the column `exit_status`." in card(planned(split="exit_status"), [])
    text = card(planned(), [])
    assert "filter" not in text
    assert "Splits" not in text


@pytest.mark.parametrize(
    ("filters", "head", "made", "failures"),
    [
        (
            [],
            "# 14 images by `simulated`",
            "14 images of 7 prompts, made by",
            "3 rows of the run failed and are not in the set:",
        ),
        (
            ["status=ok,failed"],
            "# 14 images by `simulated`",
            "14 images of 7 prompts, and 3 failed rows without an image, made by",
            "3 rows of the run failed; they are in the set, without an image:",
        ),
        (
            ["status=ok,failed", "row<5"],
            "# 8 images by `simulated`",
            "8 images of 4 prompts, and 1 failed row without an image, made by",
            "3 rows of the run failed; 1 of them is in the set, without an image:",
        ),
        (
            ["status=failed"],
            "# 3 failed rows by `simulated`",
            "3 failed rows without an image, made by",
            "3 rows of the run failed; they are in the set, without an image:",
        ),
    ],
)
def test_the_card_counts_images_and_failed_rows_apart(
    planned: Planned, filters: list[str], head: str, made: str, failures: str
) -> None:
    text = card(planned(*filters), [])
    for line in (head, made, failures, "- 2 rows: `boom`", "- 1 row: `bang`"):
        assert line in text
    assert "No row of the run had failed" in card(planned(failed=False), [])


@pytest.mark.parametrize("place", ["", "images/set", "data/x", "manifest/x", "set", "../out/set", "../link/set"])
def test_a_place_within_the_run_is_refused(planned: Planned, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(InputError, match=r"within the run .*/out, .*; name a place outside it"):
        planned(target=str(tmp_path / "out" / place))
    assert planned(target=str(tmp_path / "out-set")).parts
    require_outside(Storage("s3://bucket/out/set", {"key": "k", "secret": "s"}), Storage(str(tmp_path / "out")))


def test_a_place_within_the_run_is_refused_in_a_store(tmp_path: Path, s3: StoreServer) -> None:
    def at(path: str) -> Storage:
        return Storage(s3.url(f"{tmp_path.name}/{path}"), s3.options)

    run = at("out")
    run.put("run.json", b"{}")
    for place in ("out", "out/images/set", "out/set/"):
        with pytest.raises(InputError, match="name a place outside it"):
            require_outside(at(place), run)
    for place in ("", "set", "out-set"):
        require_outside(at(place), run)


def test_a_place_of_the_same_name_in_another_store_is_none_within_the_run(tmp_path: Path, s3: StoreServer) -> None:
    target = Storage(s3.url(f"{tmp_path.name}/out/set"), s3.options)
    other: Any = SimpleNamespace(
        filesystem=target.filesystem,
        local=False,
        root=f"bucket/{tmp_path.name}/out",
        get=lambda _: b"{}",
        url="s3://other",
    )
    require_outside(target, other)
