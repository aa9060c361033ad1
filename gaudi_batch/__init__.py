"""gaudi-batch turns a Parquet dataset of prompts into images in object storage, on every Gaudi card of a Ray cluster.

    from gaudi_batch import JobConfig, load_manifest, run

    result = run(JobConfig(prompts="prompts.parquet", output="out", model="builtin:shapes", device="cpu"))
    images = load_manifest("out").to_table(columns=["id", "path"])

What the command line does is `run`, and a job is a `JobConfig` in both. What is committed can be read by
`load_manifest`, while a run goes on and afterwards, and `data_files` names the objects of many images. All that goes
wrong with a job, its cluster or its storage is a `GaudiBatchError`, with a sentence and the exit code that it means:
`InputError`, `StorageError`, `RunStopped` and, of the last, `Interrupted`. Anything else that is raised is an error of
this program.

`run` may be called again and again, from a thread and in a notebook; one process has one connection to Ray, so two
runs at a time need `ray.init` before. It logs to `logging.getLogger("gaudi_batch")` and sets up no handler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaudi_batch.config.schema import JobConfig
    from gaudi_batch.driver.result import RunResult
    from gaudi_batch.driver.runner import run
    from gaudi_batch.errors import GaudiBatchError, InputError, Interrupted, RunStopped, StorageError
    from gaudi_batch.output.dataset_view import data_files, load_manifest

__all__ = [
    "GaudiBatchError",
    "InputError",
    "Interrupted",
    "JobConfig",
    "RunResult",
    "RunStopped",
    "StorageError",
    "data_files",
    "load_manifest",
    "run",
]

_PLACES = {
    "JobConfig": "config.schema",
    "GaudiBatchError": "errors",
    "InputError": "errors",
    "RunStopped": "errors",
    "StorageError": "errors",
    "Interrupted": "errors",
    "RunResult": "driver.result",
    "data_files": "output.dataset_view",
    "load_manifest": "output.dataset_view",
    "run": "driver.runner",
}


def __getattr__(name: str) -> Any:
    # The modules are imported when they are asked for, so that `gaudi-batch --help` answers at once.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"gaudi_batch.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([name for name in globals() if name.startswith("__")] + __all__)
