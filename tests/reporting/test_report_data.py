"""A report is right for runs of older versions and of other formats, and text in it stays text."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, called
from PIL import Image

from gaudi_batch.output.formats import WRITERS
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.records import read_records
from gaudi_batch.reporting.report import pictures
from gaudi_batch.reporting.report.page import render
from gaudi_batch.reporting.report.report import _flag_near_limits, _flag_unlike, _now, describe_report
from gaudi_batch.storage.store import Storage


def data_of(page: Path) -> dict[str, Any]:
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert script is not None
    return dict(json.loads(script[1]))


@pytest.mark.parametrize("kept", ["simulated", "cpu"])
def test_a_run_of_an_older_version_has_a_report(kept: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(REPOSITORY / "tests/data/half_done" / kept / "output", output)
    made = called("report", output, "--to", tmp_path / "report.html")
    assert made.returncode == 0, made.stderr
    data = data_of(tmp_path / "report.html")
    rows = [row for file in sorted(output.glob("manifest/*")) for row in pq.read_table(file).to_pylist()]
    assert data["state"] == "stopped"
    assert data["images"] == sum(row["status"] == "ok" for row in rows) > 0
    assert data["failed_rows"] == sum(row["status"] == "failed" for row in rows)
    assert sum(card["images"] for card in data["cards"]) == data["images"]
    assert len(data["pictures"]) == data["images"]
    assert data["stretches"], "what its batches took is drawn"


@pytest.mark.parametrize("state", ["over", "running"])
def test_rows_that_a_stopped_run_was_to_run_again_count_as_they_were(tmp_path: Path, state: str) -> None:
    """Whether its driver ended it or was killed; `status` says the same as the report."""
    output = tmp_path / "out"
    shutil.copytree(REPOSITORY / "tests/data/half_done/simulated/output", output)
    progress = json.loads((output / "progress.json").read_text())
    again = {"state": state, "rows_again": 5, "images_again": 4, "images": progress["images"] - 4, "failed_rows": 1}
    (output / "progress.json").write_text(json.dumps(progress | again))
    made = called("report", output, "--to", tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    status = json.loads(called("status", output, "--json").stdout)
    assert made.returncode == 0, made.stderr
    assert (status["images_committed"], status["failed_rows"]) == (data["images"], data["failed_rows"])


AS_OF = "2026-11-24T23:03:11.000+00:00"
DOING = {"phase": "batch", "phase_s": 40.0, "limit_s": 60.0, "doing": "batch of 64x64, 40 s of 60 s"}


def described_before_its_end(tmp_path: Path, state: str, **written: Any) -> dict[str, Any]:
    """The report of a run of two drivers, of which the second has not ended it: it wrote progress.json a second after
    it began, and has committed more since.

    Args:
        tmp_path: gets its output.
        state: as `status` has it.
        written: more of progress.json.
    """
    output = tmp_path / state
    shutil.copytree(REPOSITORY / "tests/data/half_done/simulated/output", output)
    (output / "summary.json").unlink()
    lease, progress = (json.loads((output / name).read_text()) for name in ("lease.json", "progress.json"))
    (output / "lease.json").write_text(json.dumps(lease | {"released": False}))
    begun = {"psagv": "2026-11-24T23:02:50.000+00:00", lease["driver"]: "2026-11-24T23:03:10.000+00:00"}
    spans = [
        {"driver": driver, "started_at": at, "ended_at": AS_OF, "wall_s": wall_s}
        for (driver, at), wall_s in zip(begun.items(), (8.0, 1.0), strict=True)
    ]
    cards = {name: card | DOING for name, card in progress["cards"].items()}
    running = {"time": AS_OF, "state": "running", "drivers": spans, "cards": cards}
    (output / "progress.json").write_text(json.dumps(progress | running | written))
    return describe_report(read_records(OutputReader(Storage(str(output)))), state, None)


def test_a_run_that_may_be_over_is_not_said_to_go_on(tmp_path: Path) -> None:
    """Its driver, on another machine, was killed, so that nobody can know what has become of it."""
    running, silent = (described_before_its_end(tmp_path, state) for state in ("running", "silent"))
    assert running["note"].startswith("The run goes on.")
    assert silent["note"].startswith(f"The run may be over: its driver wrote last at {AS_OF}, and")
    assert (running["as_of"], silent["as_of"]) == (None, AS_OF)
    assert {card["now"] for card in silent["cards"]} == {DOING["doing"]}, "which is what they were at then"
    near = "near its limit: batch, 40 s of 60 s"
    assert [near in card["flags"] for card in (*running["cards"], *silent["cards"])] == [True, True, False, False]
    assert "goes on" not in silent["kinds"]["uncommitted"]


def test_rows_that_are_run_again_are_told_while_the_run_goes_on(tmp_path: Path) -> None:
    data = described_before_its_end(tmp_path, "running", rows_again=3)
    assert data["note"].endswith(" 3 rows to be run again still count as they were.")


@pytest.mark.parametrize("state", ["running", "silent", "stopped"])
def test_the_figures_of_a_run_that_has_not_ended_are_of_one_moment(state: str, tmp_path: Path) -> None:
    """It has committed images since its driver wrote its time and its cost. One that is stopped was killed."""
    data = described_before_its_end(tmp_path, state, images=8, images_again=2, cost=2.5)
    assert data["wall_s"] == data["time_s"] == pytest.approx(10.4, abs=0.1), "as the plots have it"
    assert data["images"] == 21
    assert data["images_per_s_wall"] == pytest.approx(21 / data["time_s"], abs=0.001)
    assert (data["cost"], data["cost_per_image"]) == (2.5, 0.25), "what the images cost that it had then"


def test_the_cost_of_an_image_is_not_known_before_there_is_one(tmp_path: Path) -> None:
    data = described_before_its_end(tmp_path, "running", images=0, cost=2.5)
    assert (data["cost"], data["cost_per_image"]) == (2.5, None)


def test_the_first_images_of_an_object_are_read_without_the_others(tmp_path: Path) -> None:
    def png(shade: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file, "PNG")
        return file.getvalue()

    names = [f"{row:08d}-00.png" for row in range(200)]
    images = [png(shade) for shade in range(200)]
    described = pa.table({"row": list(range(200)), "prompt": ["p"] * 200})
    for suffix, write in zip(("tar", "parquet"), (WRITERS["webdataset"], WRITERS["parquet"]), strict=True):
        with (tmp_path / f"x.{suffix}").open("wb") as file:
            write(file, described, names, images)
        storage = Storage(str(tmp_path))
        first = pictures._first_images(storage, f"x.{suffix}")
        assert [next(first) for _ in range(3)] == list(zip(names, images, strict=True))[:3]
        (tmp_path / f"x.{suffix}").write_bytes((tmp_path / f"x.{suffix}").read_bytes()[:700])
        assert list(pictures._first_images(storage, f"x.{suffix}")) in ([], [(names[0], images[0])]), "it is torn"


def test_pictures_are_spread_over_groups_and_none_is_left_out_where_there_are_few() -> None:
    assert pictures._shares([1, 2, 3], 500) == [1, 2, 3]
    assert pictures._shares([1000, 2, 1000], 500) == [249, 2, 249]
    assert pictures._shares([5] * 1000, 500) == [1] * 500 + [0] * 500
    assert pictures._shares([], 500) == []


def test_nothing_that_a_run_says_ends_the_script_element() -> None:
    page = render({"output": "</title><b>", "prompt": "</script><!--<script>&\u2028", "n": 1}).decode()
    assert page.count("</script>") == 4 == page.count("<script")
    assert "<b>" not in page
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["prompt"] == "</script><!--<script>&\u2028"


def test_a_card_that_is_near_a_limit_is_named() -> None:
    cards = [
        {"name": str(used), "flags": []} | _now({"phase": "batch", "phase_s": used, "limit_s": 60}) for used in (9, 31)
    ]
    _flag_near_limits(cards)
    assert [card["flags"] for card in cards] == [[], ["near its limit: batch, 31 s of 60 s"]]
    cards = [{"flags": []} | _now({})]
    _flag_near_limits(cards)
    assert cards[0]["flags"] == [], "of a run that is over"


def test_of_two_cards_the_one_that_lost_its_time_is_named() -> None:
    cards = [
        {"name": "a", "spent": {"generating": 90.0, "tail": 10.0}, "flags": []},
        {"name": "b", "spent": {"generating": 40.0, "lost": 60.0}, "flags": []},
    ]
    _flag_unlike(cards)
    assert [card["flags"] for card in cards] == [[], ["lost: 60% of its time, others 0%"]]
