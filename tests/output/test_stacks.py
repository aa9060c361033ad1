"""The stacks that have made the images of a run are written down before their manifests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from helpers import Unfenced

from gaudi_batch.output import manifest
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.storage.store import Storage


def stacks(output: Path) -> list[dict[str, str]]:
    stored: list[dict[str, str]] = json.loads((output / "run.json").read_text()).get("stacks", [])
    return stored


def test_what_has_made_an_image_is_written_down_before_its_manifest(tmp_path: Path) -> None:
    """As the last look before a manifest sees it; so no crash leaves images of a stack that nobody wrote down."""
    seen: list[Any] = []
    output = Storage(str(tmp_path / "out"))
    record = RunInfo({"device": "cpu"}, {}, {}, "", rows=1, images=1, run_id="run", stacks=[{"torch": "1"}])
    output.put("run.json", json.dumps(vars(record)).encode())

    class Seen(Unfenced):
        def ensure_held(self) -> None:
            seen.append(stacks(tmp_path / "out"))

    ledger = Ledger(output, Seen())
    ledger.run()
    assert ledger.use_stack({"torch": "2"}) == {"torch": "1"}
    info = CommitInfo(0, "aaaaa1", "card", "node", None, 0, 0, 0, ThroughputTotals(), "run")
    assert ledger.commit(info, manifest.build([], pa.table({}), {}, {}, 0, info))
    assert seen == [[{"torch": "1"}], [{"torch": "1"}, {"torch": "2"}]]
    assert OutputReader(output).run() == replace(record, stacks=[{"torch": "1"}, {"torch": "2"}])


def test_every_change_between_stacks_warns_that_was_made_before_too(tmp_path: Path) -> None:
    output, both = Storage(str(tmp_path / "out")), [{"torch": "1"}, {"torch": "2"}]
    record = RunInfo({"device": "cpu"}, {}, {}, "", rows=1, images=1, run_id="run", stacks=both)
    output.put("run.json", json.dumps(vars(record)).encode())
    ledger = Ledger(output, Unfenced())
    ledger.run()
    assert ledger.use_stack({"torch": "1"}) == {"torch": "2"}
    assert ledger.use_stack({"torch": "2"}) == {"torch": "2"}, "another took its place before anything was committed"
    assert ledger.use_stack({"torch": "1"}) == {"torch": "2"}
    info = CommitInfo(0, "aaaaa1", "card", "node", None, 0, 0, 0, ThroughputTotals(), "run")
    ledger.commit(info, manifest.build([], pa.table({}), {}, {}, 0, info))
    assert stacks(tmp_path / "out") == [*both, {"torch": "1"}]
