"""Many nodes, each a process with a home of its own, fetch a model of the tests' hub at the same moment; prints what
the hub was asked for, as one line of JSON.

    PYTHONPATH=tests python tests/cluster/node_caches.py 64
    PYTHONPATH=tests python tests/cluster/node_caches.py 64 --alone
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a token would lie in a home

import ray
from hub import COMMIT, hub_served

from gaudi_batch import JobConfig
from gaudi_batch.cluster.model_peers import CALLS, GROUP, peers_of_card, start_tracker
from gaudi_batch.pipelines.model_cache import ModelCache
from gaudi_batch.pipelines.origins import HubOrigin
from gaudi_batch.pipelines.sources import ModelInfo, describe_model


class Node:
    """A node's cache, filled and offered as a card does it."""

    def __init__(self, number: int, tracker: Any) -> None:
        self._peers = peers_of_card(tracker, f"node {number}")

    def ready(self) -> None:
        """It has started."""

    def fetch(self, model: ModelInfo) -> str:
        """Fetches the model; returns a digest of its weights."""
        root = Path.home() / "models"
        directory = ModelCache(root, 10**12).get(HubOrigin(model, root), self._peers)
        hasher = hashlib.sha256()
        for path in sorted(directory.rglob("*.safetensors")):
            hasher.update(path.read_bytes())
        return hasher.hexdigest()

    def model_files(self, revision: str) -> Any:
        """See `Card`."""
        return self._peers.files(revision)

    def read_model(self, revision: str, path: str, start: int, stop: int) -> Any:
        """See `Card`."""
        return self._peers.read(revision, path, start, stop)


def main() -> None:
    """Starts the nodes, has them fetch, and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int)
    parser.add_argument("--alone", action="store_true", help="each fetches by itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, hub_served() as hub:
        hub_variables = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        os.environ |= hub_variables | {"HF_HOME": f"{place}/driver"}
        model = describe_model(JobConfig(prompts="p", output="o", model="tests/shapes", device="cpu"))
        assert model.revision == COMMIT
        asked_by_driver = hub.requests
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        tracker = None if options.alone else start_tracker()
        actor_class: Any = ray.remote(concurrency_groups={GROUP: CALLS})(Node)
        nodes = []
        for number in range(options.nodes):
            home = f"{place}/{number}"
            variables = hub_variables | {"HOME": home, "HF_HOME": f"{home}/hf"}
            actor_options = {"num_cpus": 0, "max_concurrency": 2, "runtime_env": {"env_vars": variables}}
            nodes.append(actor_class.options(**actor_options).remote(number, tracker))
        ray.get([node.ready.remote() for node in nodes])
        began = time.monotonic()
        digests = ray.get([node.fetch.remote(model) for node in nodes])
        seconds = time.monotonic() - began
        ray.shutdown()
        own = {path.parent.name for path in Path(place).glob("*/models") if (path / COMMIT).is_dir()}
        figures = {
            "nodes": options.nodes,
            "same_weights": len(set(digests)) == 1,
            "requests": hub.requests - asked_by_driver,
            "requests_of_driver": asked_by_driver,
            "downloads_of_weights": sorted(hub.weights().values()),
            "from_other_nodes": len(own),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
