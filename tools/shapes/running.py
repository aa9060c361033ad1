"""What both trainings share: a moving average of the weights, checkpoints, the learning rate and progress."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step alone, so that a resumed training goes on as if it had never stopped."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Run:
    """One training: modules, their optimiser and their averaged weights, kept in a checkpoint.

    Args:
        name: of the phase; names the checkpoint and the log lines.
        modules: what is trained, by name.
        checkpoints: directory of the checkpoint; None keeps none.
        steps: how many steps make the whole training.
        peak: highest learning rate.
        ema: share of the average that stays at each step, late in the training.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, torch.nn.Module],
        checkpoints: Path | None,
        *,
        steps: int,
        peak: float,
        ema: float = 0.999,
        weight_decay: float = 0.01,
    ) -> None:
        self.name, self.modules, self.steps, self.peak, self.ema = name, modules, steps, peak, ema
        self.path = checkpoints / f"{name}.pt" if checkpoints else None
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.average = copy.deepcopy(modules)
        self.step = 0
        self.seconds = 0.0
        for module in self.average.values():
            module.requires_grad_(False).eval()
        if self.path and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            self.average[name].load_state_dict(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("%s: going on from step %d", self.name, self.step)

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.path:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        torch.save(
            {
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "average": {name: module.state_dict() for name, module in self.average.items()},
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
            fresh,
        )
        fresh.replace(self.path)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the steps still to do; between two of them `update` must be called."""
        last_save = time.monotonic()
        while self.step < self.steps:
            begun = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - begun
            if time.monotonic() - last_save > 120:
                self.save()
                last_save = time.monotonic()
        self.save()

    def update(self, loss: torch.Tensor, **shown: float) -> None:
        """Take one step down the gradient of `loss`, and log now and then."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.peak)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        # The average of the first steps would otherwise be that of random weights.
        keep = min(self.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, module in self.modules.items():
                for average, current in zip(self.average[name].parameters(), module.parameters(), strict=True):
                    average.lerp_(current, 1 - keep)
        if self.step % 100 == 0:
            numbers = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
            logger.info(
                "%s: step %d of %d  loss %.4f  %s  %.0f s",
                self.name,
                self.step,
                self.steps,
                loss.item(),
                numbers,
                self.seconds,
            )
