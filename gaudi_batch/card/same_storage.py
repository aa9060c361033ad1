"""Whether a card's node sees the driver's output and prompts."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from gaudi_batch.card.messages import CardSetup
from gaudi_batch.errors import InputError
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.lease import REREAD_INTERVAL_S
from gaudi_batch.output.reader import OutputReader


def require_shared(setup: CardSetup) -> None:
    """Makes sure that this node sees the driver's output and prompts. A directory of the same name on the node's own
    disk would take images that nobody finds.

    Raises:
        RuntimeError: it does not.
        StorageError: storage refuses this node.
    """
    prompts = setup.job.dataset.storage
    way_out = "a local path must be on a file system that all nodes share"
    if not _sees_run(setup):
        raise RuntimeError(f"node {socket.gethostname()} does not see this run in {setup.storage.url}; {way_out}")
    if prompts.local and not Path(prompts.full(setup.job.dataset.files[0].name)).exists():
        raise RuntimeError(f"node {socket.gethostname()} does not see the prompts in {prompts.url}; {way_out}")


def _sees_run(setup: CardSetup) -> bool:
    """Whether the output has the run's record, or the lease of the driver that is about to write it. What says no is
    read twice, since storage may answer with what was there a moment ago."""
    for pause in (0.0, REREAD_INTERVAL_S):
        time.sleep(pause)
        try:
            run = OutputReader(setup.storage).run()
        except InputError:
            run = None
        if run is not None and run.run_id == setup.run_id:
            return True
        lease = read_lease(setup.storage)
        if lease is not None and lease.driver == setup.driver:
            return True
    return False
