"""What Ray makes of emulated cards, as one line of JSON; run by test_emulator.py, not a test itself."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

import ray

IMPORT_ORDERS = [
    ["ray", "torch", "habana_frameworks.torch"],
    ["torch", "ray", "habana_frameworks.torch"],
    ["habana_frameworks.torch", "torch", "ray"],
]


@ray.remote(resources={"HPU": 1}, num_cpus=0, max_restarts=0)
class Card:
    """Holds one card."""

    def acquire(self, modules: list[str]) -> dict[str, Any]:
        """Imports in an order, then uses the card from a thread of its own."""
        visible = os.environ["HABANA_VISIBLE_MODULES"]
        for module in modules:
            importlib.import_module(module)
        import habana_frameworks.torch.hpu as hpu
        import torch

        before = hpu.is_initialized()
        devices: list[str] = []
        thread = threading.Thread(target=lambda: devices.append(str(torch.ones(2, device="hpu").device)))
        thread.start()
        thread.join()
        return {
            "pid": os.getpid(),
            "visible": visible,
            "still_visible": os.environ["HABANA_VISIBLE_MODULES"],
            "count": hpu.device_count(),
            "acquired_by_import": before,
            "device": devices[0],
        }


@ray.remote(resources={"HPU": 1}, num_cpus=0, max_restarts=0)
class Holder:
    """Holds one card and imports nothing for it but the emulator."""

    def acquire(self) -> dict[str, Any]:
        """Takes the module that Ray pinned."""
        from habana_frameworks._emulation.modules import acquire

        return {"pid": os.getpid(), "visible": os.environ["HABANA_VISIBLE_MODULES"], "module": acquire()}


def main() -> None:
    """A card for each import order, and the rest of the machine's, all at once; then one killed and replaced."""
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, object_store_memory=80 * 1024**2, logging_level="ERROR"
    )
    cards = [Card.remote() for _ in IMPORT_ORDERS]
    holders = [Holder.remote() for _ in range(int(ray.cluster_resources()["HPU"]) - len(cards))]
    others = [holder.acquire.remote() for holder in holders]
    held = ray.get([card.acquire.remote(order) for card, order in zip(cards, IMPORT_ORDERS, strict=True)])
    rest = ray.get(others)
    os.kill(held[1]["pid"], signal.SIGKILL)
    replacement = ray.get(Card.remote().acquire.remote(IMPORT_ORDERS[0]))
    info = {
        "resources": ray.cluster_resources().get("HPU"),
        "held": held,
        "rest": rest,
        "replacement": replacement,
        "driver": os.getpid(),
    }
    ray.shutdown()
    json.dump(info, sys.stdout)


if __name__ == "__main__":
    main()
