"""The garbage collector is held off while records are read, and is what it was afterwards."""

from __future__ import annotations

import gc

import pytest

from gaudi_batch.garbage import no_collections


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_held_off_and_is_then_what_it_was(enabled: bool) -> None:
    inside: list[bool] = []

    @no_collections()
    def read() -> None:
        inside.append(gc.isenabled())
        raise ValueError("it can't be read")

    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="it can't be read"):
                read()
        assert inside == [False, False]
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
