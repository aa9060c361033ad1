"""The driver's event loop asks Ray for nothing that it would have to wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray._private.worker import global_worker

from gaudi_batch import JobConfig, run

HARMLESS = {
    "submit_actor_task",  # puts a call into the queue of this process
    "set_get_async_callback",  # has a thread of Ray's call back
    "remove_object_ref_reference",  # counts
    "remove_actor_handle_reference",
}
"""What a core worker does without waiting for another process, beside what it tells of itself."""


class Recorder:
    """Stands for a part of Ray and writes down what is called in the thread of a running event loop."""

    def __init__(self, part: Any, called: set[str]) -> None:
        self._part, self._called = part, called

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._part, name)
        if not callable(attribute):
            return attribute

        def call(*arguments: Any, **named: Any) -> Any:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                self._called.add(name)
            return attribute(*arguments, **named)

        return call


def test_no_call_of_ray_holds_the_loop(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards start, one is replaced, one is quarantined, and all are given back."""
    prompts = write_prompts({"prompt": [f"prompt {row}" for row in range(24)]})
    called: set[str] = set()
    ray.init(cluster, log_to_driver=False, configure_logging=False)
    try:
        for part in ("core_worker", "gcs_client"):
            monkeypatch.setattr(global_worker, part, Recorder(getattr(global_worker, part), called))
        monkeypatch.setattr(
            state, "_connect_and_get_accessor", lambda get=state._connect_and_get_accessor: Recorder(get(), called)
        )
        result = run(
            JobConfig(
                prompts=str(prompts),
                output=str(tmp_path / "out"),
                device="simulated",
                simulated={"batch_seconds": 0.2, "unloadable_modules": [1]},
                batch_size=2,
                cards=3,
            )
        )
    finally:
        monkeypatch.undo()
        ray.shutdown()
    assert result.exit_code == 0
    assert "submit_actor_task" in called, "nothing was recorded"
    assert {name for name in called - HARMLESS if not name.startswith("get_current_")} == set()
