"""What a run was told and decided is in its output when it stops, and can be decided again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gaudi_batch import JobConfig, RunStopped, run
from gaudi_batch.scheduling.decisions import Commit, Quarantine, Replace
from gaudi_batch.scheduling.event_log import load, main, replay
from gaudi_batch.scheduling.events import CardDied, CardLoaded, ShardFailed, ShardMade


@pytest.mark.thorough
def test_the_log_of_a_run_with_faults_is_replayed_with_the_same_decisions(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row kills its process, rows raise, a card fails at everything, and in the end too many rows have failed."""
    prompts, output = write_prompts({"prompt": ["p"] * 480}), tmp_path / "out"
    faults: dict[str, Any] = {"kill_rows": [21], "raise_rows": [40, 41, *range(420, 480)], "broken_modules": [1]}
    job = JobConfig(
        prompts=str(prompts),
        output=str(output),
        device="simulated",
        simulated={"batch_seconds": 0.5, **faults},
        shard_size=8,
        batch_size=4,
        max_failed=12,
    )
    with pytest.raises(RunStopped, match="more than max_failed"):
        run(job, address=cluster)
    data = (output / "events.bin").read_bytes()
    _, entries = load(data)
    events = Counter(type(entry.event) for entry in entries)
    decisions = Counter(type(decision) for entry in entries for decision in entry.decisions)
    assert events[CardDied] >= 1, events
    assert min(events[CardLoaded], events[ShardFailed], events[ShardMade]) >= 1, events
    assert decisions[Replace] + decisions[Quarantine] >= 2, decisions
    assert decisions[Commit] >= 8, decisions
    assert replay(data) == (len(entries), [])
    assert main([str(output / "events.bin")]) == 0
    assert "all decisions the same" in capsys.readouterr().out


def test_a_run_that_is_complete_leaves_no_log(write_prompts: Callable[..., Path], tmp_path: Path, cluster: str) -> None:
    prompts = write_prompts({"prompt": ["p"] * 8})
    fields: dict[str, Any] = {"device": "simulated", "cards": 1, "simulated": {"batch_seconds": 0.01}}
    run(JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), **fields), address=cluster)
    assert not (tmp_path / "out/events.bin").exists()
